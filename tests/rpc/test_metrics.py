"""What a service shows over HTTP: metrics for Prometheus, and the web page."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bnlayer import PeerLostError
from bnserver.authorization import Role, entry
from bnworker import World
from support.authorities import Authority
from support.looking_on import LONG_S, joined, logged_url, paired, train, until

pytestmark = pytest.mark.rpc

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _scrape(url: str, token: str | None = None, ca: Path | None = None) -> tuple[str, Samples]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    context = ssl.create_default_context(cafile=ca) if ca is not None else None
    with urllib.request.urlopen(request, timeout=LONG_S, context=context) as answer:
        text = answer.read().decode()
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return text, samples


def _refused(
    url: str, token: str | None = None, ca: Path | None = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    """The status and the text of an answer that is none."""
    shown = {"Authorization": f"Bearer {token}"} if token else {}
    context = ssl.create_default_context(cafile=ca) if ca is not None else None
    request = urllib.request.Request(url, headers=shown | (headers or {}))
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=LONG_S, context=context)
    with refused.value as error:
        return error.code, error.read().decode()


def _value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"bnserver_{name}", frozenset(labels.items())))


# ---- metrics ----


def test_a_scrape_says_who_waits_for_whom(serve: Callable[..., Any], tmp_path: Path) -> None:
    """By rank, while it happens; and everything that Prometheus' own linter knows is right."""
    log = tmp_path / "log"
    service = serve("--metrics", "127.0.0.1:0", "--log-file", str(log), "--state-dir", str(tmp_path / "state"))
    url = logged_url(log, "metrics: ")
    assert [name for (name, _), value in _scrape(url)[1].items() if "job_" in name or "rank" in name] == []
    go = threading.Event()

    def second(world: World) -> None:
        train(world, 3)
        go.wait(LONG_S)
        world.barrier()

    with paired(service.address, second, 'a "job"\n') as world:
        train(world, 3)
        waiting = threading.Thread(target=world.barrier, daemon=True)
        waiting.start()
        of = {"job_name": 'a "job"\n'}
        until(lambda: bool(_value(_scrape(url)[1], "rank_awaited_seconds", **of, rank="1")))
        text, first = _scrape(url)
        _, later = _scrape(url)
        for name, rank, grows in (
            ("rank_waited_seconds_total", "0", True),
            ("rank_waited_seconds_total", "1", False),
            ("rank_held_up_seconds_total", "0", False),
            ("rank_held_up_seconds_total", "1", True),
        ):
            before, after = _value(first, name, **of, rank=rank), _value(later, name, **of, rank=rank)
            assert before is not None
            assert after is not None
            assert (after > before) is grows, (name, rank)
        sums = {"operation": "sums", "direction": "forward"}
        assert _value(first, "operations_total", **of, **sums) == 3
        assert _value(first, "operation_seconds_count", **of) == _value(first, "handling_seconds_count")
        assert _value(first, "received_bytes_total", **of) == _value(first, "sent_bytes_total", **of)
        assert _value(first, "job_ranks", **of) == _value(first, "job_connected_ranks", **of) == 2
        assert _value(first, "job_version", **of) == 3
        assert _value(first, "jobs", state="running") == 1
        assert _value(first, "connections", channel="stream") == _value(first, "connections", channel="local_socket")
        go.set()
        waiting.join(LONG_S)
    promtool = shutil.which("promtool")
    assert promtool is not None, "see .ci/system-tools"
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    until(lambda: _value(_scrape(url)[1], "saves_total") == 1)
    over = _scrape(url)[1]
    assert [name for (name, labels) in over if "job_name" in dict(labels)] == []
    assert _value(over, "ended_generations_total", reason="none") == 1
    assert _value(over, "handling_seconds_count") == (_value(first, "handling_seconds_count") or 0) + 1
    assert service.end(signal.SIGTERM)[0] == 0


def test_a_lost_rank_is_counted_and_named(serve: Callable[..., Any], tmp_path: Path) -> None:
    """What alerts are made of; and on the page."""
    log = tmp_path / "log"
    flags = ("--state-dir", str(tmp_path / "state"), "--metrics", "127.0.0.1:0", "--dashboard", "127.0.0.1:0")
    service = serve(*flags, "--log-file", str(log))
    url = logged_url(log, "metrics: ")

    def second() -> None:
        with suppress(ZeroDivisionError), joined(service.address, 1, 2) as world:
            train(world, 1)
            raise ZeroDivisionError

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    with pytest.raises(PeerLostError), joined(service.address, 0, 2) as world:
        train(world, 2)
    thread.join(LONG_S)
    samples = _scrape(url)[1]
    assert _value(samples, "ended_generations_total", reason="PEER_LOST") == 1
    assert (_value(samples, "failed_streams_total", reason="PEER_LOST") or 0) >= 1
    assert (_value(samples, "state_dir_free_bytes") or 0) > 0
    page = logged_url(log, "dashboard: ")
    until(lambda: bool(_event(page)["failures"]))
    (failure,) = _event(page)["failures"]
    assert (failure["job"], failure["generation"], failure["reason"]) == ("job", 1, "PEER_LOST")
    assert failure["text"].startswith("rank 1 (host ")


def test_metrics_ask_for_what_the_service_asks_for(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Its certificate, and a token; a reader sees the jobs of its token."""
    authority = Authority(tmp_path / "authority")
    tokens, log = tmp_path / "tokens.toml", tmp_path / "log"
    tokens.touch(0o600)
    tokens.write_text(
        entry("ops", "ops-secret", ["*"], Role.ADMIN)
        + entry("team", "team-secret", ["team-*"], Role.READER)
        + entry("other", "other-secret", ["other-*"], Role.READER)
    )
    flags = (*authority.flags(), "--tokens", str(tokens), "--metrics", "127.0.0.1:0", "--log-file", str(log))
    service = serve(*flags)
    url = logged_url(log, "metrics: ")
    assert url.startswith("https://127.0.0.1:")
    with joined(service.address, job="team-1", credentials=authority.credentials(token="ops-secret")):
        seen = {
            name: _value(_scrape(url, f"{name}-secret", authority.ca)[1], "job_ranks", job_name="team-1")
            for name in ("ops", "team", "other")
        }
    assert seen == {"ops": 1, "team": 1, "other": None}
    samples = _scrape(url, "ops-secret", authority.ca)[1]
    assert (_value(samples, "certificate_expiry_timestamp_seconds") or 0) > time.time()
    for token in (None, "wrong-secret"):
        code, text = _refused(url, token, authority.ca)
        assert code == 401
        assert "token" in text
    after = _scrape(url, "ops-secret", authority.ca)[1]
    assert _value(after, "refused_calls_total", reason="unauthenticated") == 2
    with pytest.raises((urllib.error.URLError, OSError)):
        _scrape(url.replace("https", "http"))


def test_who_connects_to_the_metrics_and_is_mute_holds_up_nobody(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Eight may; one more is sent away at once, and when they are gone, or have been silent for 5 s, there is room."""
    log = tmp_path / "log"
    service = serve("--metrics", "127.0.0.1:0", "--log-file", str(log))
    url = logged_url(log, "metrics: ")
    host, _, port = url.removeprefix("http://").removesuffix("/metrics").partition(":")
    mute = [socket.create_connection((host, int(port)), timeout=LONG_S) for _ in range(8)]
    with socket.create_connection((host, int(port)), timeout=LONG_S) as ninth:
        assert ninth.recv(1) == b""
        mute[0].setblocking(False)
        with pytest.raises(BlockingIOError):  # and that was not for its silence, as this one has been silent for longer
            mute[0].recv(1)
        mute[0].settimeout(LONG_S)
    with joined(service.address) as world:
        train(world, 3)
    for number, one in enumerate(mute):
        with one:
            assert number < 4 or one.recv(1) == b""  # the service closes it

    def is_served() -> bool:
        try:
            return bool(_scrape(url)[1])
        except (urllib.error.URLError, OSError):
            return False

    until(is_served)
    for path, code in (("", 404), ("/metrics/../x", 404)):
        assert _refused(url.removesuffix("/metrics") + path)[0] == code
    assert service.end(signal.SIGTERM)[0] == 0


def test_who_connects_to_the_page_and_asks_for_nothing_is_closed(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Mute, or with half a request; the 129th at once. They took viewers' places and files of the service for ever."""
    log = tmp_path / "log"
    service = serve("--dashboard", "127.0.0.1:0", "--log-file", str(log))
    url = logged_url(log, "dashboard: ")
    host, _, port = url.removeprefix("http://").strip("/").partition(":")
    with ExitStack() as open_ones:

        def connected(said: bytes = b"") -> socket.socket:
            one = open_ones.enter_context(socket.create_connection((host, int(port)), timeout=LONG_S))
            one.sendall(said)
            return one

        request = b"GET /events HTTP/1.1\r\nHost: localhost\r\n"
        viewer, mute, half = connected(request + b"\r\n"), connected(), connected(request)
        assert viewer.recv(2**16).startswith(b"HTTP/1.1 200 ")
        last = [connected() for _ in range(126)][-1]
        for closed in (last, mute, half):
            with suppress(ConnectionResetError):
                assert closed.recv(1) == b""

        def is_served() -> bool:
            with suppress(urllib.error.HTTPError):  # as long as others are to be closed
                return bool(_event(url)["time"])
            return False

        until(is_served)
        viewer.setblocking(False)
        assert b"data: " in viewer.recv(2**16)  # it was not closed meanwhile, nor left without news
    assert service.end(signal.SIGTERM)[0] == 0


def test_metrics_that_cannot_be_served(start: Callable[..., Any]) -> None:
    """Names of jobs are not for everybody; and a port that can't be had is told before ranks join."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for given, code, error in (
            ("0.0.0.0:0", 2, "bnserver: 0.0.0.0:0 is reachable from other machines, and without --tls-cert"),
            (address, 1, f"bnserver: Can't listen on {address}: "),
        ):
            arguments = ["--listen", "127.0.0.1:0", "--metrics", given]
            ended, out, err = start("-m", "bnserver", *arguments).end(within=150)
            assert (ended, out) == (code, "")
            assert error in err


# ---- the web page ----


def _event(url: str, token: str | None = None, ca: Path | None = None) -> dict[str, Any]:
    """What a viewer sees next that has a job."""
    request = urllib.request.Request(f"{url}events", headers={"Authorization": f"Bearer {token}"} if token else {})
    context = ssl.create_default_context(cafile=ca) if ca is not None else None
    with urllib.request.urlopen(request, timeout=LONG_S, context=context) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        line = answer.readline().decode()
    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return event


def test_the_page_shows_a_running_job(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Ranks, layers and their statistics, as they are now; and every file that a browser then asks for."""
    log = tmp_path / "log"
    service = serve("--dashboard", "127.0.0.1:0", "--log-file", str(log))
    url = logged_url(log, "dashboard: ")
    go = threading.Event()

    def second(world: World) -> None:
        train(world, 2)
        go.wait(LONG_S)

    with paired(service.address, second) as world:
        layer = train(world, 2)
        until(lambda: [job["version"] for job in _event(url)["jobs"]] == [2])
        (job,) = _event(url)["jobs"]
        assert (job["job"], job["state"], job["world_size"], len(job["ranks"])) == ("job", "running", 2, 2)
        assert job["layers"] == [{"layer": "a", "version": 2, "channels": 2, "drifts": []}]
        with urllib.request.urlopen(f"{url}series?job=job&layer=a", timeout=LONG_S) as answer:
            series = json.load(answer)
        mean = np.asarray(layer.moving_mean).astype(float)
        assert [column[-1] for column in series["mean"]] == np.percentile(mean, series["quantiles"]).tolist()
        go.set()
    for name in ("", "page.js", "page.css", "uPlot.iife.min.js", "uPlot.min.css", "icon.svg"):
        with urllib.request.urlopen(url + name, timeout=LONG_S) as answer:
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'; ")
            assert answer.read()
    for path, headers, code in (
        ("series?job=job&layer=none", {}, 404),
        ("../../../etc/passwd", {}, 404),
        ("events", {"Host": "evil.example"}, 421),
    ):
        assert _refused(url + path, headers=headers)[0] == code
    with urllib.request.urlopen(f"{url}events", timeout=LONG_S) as viewer:
        viewer.readline()
        code, _, said = service.end(signal.SIGTERM)
    assert code == 0
    assert "Traceback" not in said


def test_the_page_asks_for_what_the_service_asks_for(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Its certificate, renewed ones included, and a token, whose jobs it shows."""
    authority = Authority(tmp_path / "authority")
    tokens, log = tmp_path / "tokens.toml", tmp_path / "log"
    tokens.touch(0o600)
    tokens.write_text(
        entry("team", "team-secret", ["team-*"], Role.WORKER) + entry("other", "other-secret", ["other-*"], Role.READER)
    )
    flags = (*authority.flags(), "--tokens", str(tokens), "--dashboard", "127.0.0.1:0", "--log-file", str(log))
    service = serve(*flags)
    url = logged_url(log, "dashboard: ")
    assert url.startswith("https://")

    def seen(name: str) -> list[str]:
        return [job["job"] for job in _event(url, f"{name}-secret", authority.ca)["jobs"]]

    with joined(service.address, job="team-1", credentials=authority.credentials(token="team-secret")) as world:
        train(world, 1)
        until(lambda: seen("team") == ["team-1"])
        assert seen("other") == []
        for path, token, code in (("events", None, 401), ("series?job=team-1&layer=a", "other-secret", 404)):
            assert _refused(url + path, token, authority.ca)[0] == code
        context = ssl.create_default_context(cafile=authority.ca)

        def serial() -> int:
            host, _, port = url.removeprefix("https://").removesuffix("/").partition(":")
            with (
                socket.create_connection((host, int(port)), timeout=LONG_S) as plain,
                context.wrap_socket(plain, server_hostname=host) as encrypted,
            ):
                return int(str((encrypted.getpeercert() or {})["serialNumber"]), 16)

        before = serial()
        authority.issue("server")
        service.signal(signal.SIGHUP)
        until(lambda: serial() != before)
