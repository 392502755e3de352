"""Those who look on: Prometheus, `bnlayer jobs`, and readers of moving statistics. None of them is a rank."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bnlayer import BatchNormalization, PeerLostError, ServiceError
from bnproto.channel import CLIENT_OPTIONS
from bnproto.credentials import NONE, Credentials
from bnproto.v1 import observation_pb2 as pb
from bnproto.v1 import observation_pb2_grpc as rpc
from bnserver.authorization import Role, entry
from bnworker import MovingStatistics, World, follow
from bnworker.transports.service import ServiceTransport
from support.authorities import Authority

pytestmark = pytest.mark.rpc

_X = np.arange(12, dtype=np.float32).reshape(6, 2)
_LONG_S = 200.0

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _world(
    address: str, rank: int = 0, world_size: int = 1, job: str = "job", credentials: Credentials = NONE
) -> World:
    transport = ServiceTransport(address, job, rank, world_size, timeout=_LONG_S, credentials=credentials)
    return World(transport, install=False)


@contextmanager
def _pair(address: str, body: Callable[[World], None], job: str = "job") -> Iterator[World]:
    """Rank 0 of a job of two, while rank 1 does something in a thread; both leave."""

    def second() -> None:
        with _world(address, 1, 2, job) as world:
            body(world)

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    with _world(address, 0, 2, job) as world:
        yield world
    thread.join(_LONG_S)
    assert not thread.is_alive()


def _train(world: World, steps: int, begin: int = 0) -> BatchNormalization:
    layer = BatchNormalization(synchronized=True, name="a", collective=world)
    for step in range(begin, begin + steps):
        layer(_X + step, training=True)
    return layer


def _said(log: Path, what: str) -> str:
    """The last word of a line of the log."""
    (line,) = [line for line in log.read_text(encoding="utf-8").splitlines() if what in line]
    return line.split()[-1]


def _scrape(url: str, token: str | None = None, ca: Path | None = None) -> tuple[str, Samples]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    context = ssl.create_default_context(cafile=ca) if ca is not None else None
    with urllib.request.urlopen(request, timeout=_LONG_S, context=context) as answer:
        text = answer.read().decode()
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return text, samples


def _value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"bnserver_{name}", frozenset(labels.items())))


def _until(true: Callable[[], bool]) -> None:
    """Wait; a test that waits in vain ends by its timeout."""
    while not true():
        time.sleep(0.02)


# ---- metrics ----


def test_a_scrape_says_who_waits_for_whom(serve: Callable[..., Any], tmp_path: Path) -> None:
    """By rank, while it happens; and everything that Prometheus' own linter knows is right."""
    log = tmp_path / "log"
    service = serve("--metrics", "127.0.0.1:0", "--log-file", str(log), "--state-dir", str(tmp_path / "state"))
    url = _said(log, "metrics: ")
    assert [name for (name, _), value in _scrape(url)[1].items() if "job_" in name or "rank" in name] == []
    go = threading.Event()

    def second(world: World) -> None:
        _train(world, 3)
        go.wait(_LONG_S)
        world.barrier()

    with _pair(service.address, second, 'a "job"\n') as world:
        _train(world, 3)
        waiting = threading.Thread(target=world.barrier, daemon=True)
        waiting.start()
        of = {"job_name": 'a "job"\n'}
        _until(lambda: bool(_value(_scrape(url)[1], "rank_awaited_seconds", **of, rank="1")))
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
        waiting.join(_LONG_S)
    promtool = shutil.which("promtool")
    assert promtool is not None, "see .ci/system-tools"
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    _until(lambda: _value(_scrape(url)[1], "saves_total") == 1)
    over = _scrape(url)[1]
    assert [name for (name, labels) in over if "job_name" in dict(labels)] == []
    assert _value(over, "ended_generations_total", reason="none") == 1
    assert _value(over, "handling_seconds_count") == (_value(first, "handling_seconds_count") or 0) + 1
    assert service.end(signal.SIGTERM)[0] == 0


def test_a_lost_rank_is_counted(serve: Callable[..., Any], tmp_path: Path) -> None:
    """What alerts are made of."""
    log = tmp_path / "log"
    service = serve("--state-dir", str(tmp_path / "state"), "--metrics", "127.0.0.1:0", "--log-file", str(log))
    url = _said(log, "metrics: ")

    def second() -> None:
        with suppress(ZeroDivisionError), _world(service.address, 1, 2) as world:
            _train(world, 1)
            raise ZeroDivisionError

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    with pytest.raises(PeerLostError), _world(service.address, 0, 2) as world:
        _train(world, 2)
    thread.join(_LONG_S)
    samples = _scrape(url)[1]
    assert _value(samples, "ended_generations_total", reason="PEER_LOST") == 1
    assert (_value(samples, "failed_streams_total", reason="PEER_LOST") or 0) >= 1
    assert (_value(samples, "state_dir_free_bytes") or 0) > 0


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
    url = _said(log, "metrics: ")
    assert url.startswith("https://127.0.0.1:")
    with _world(service.address, job="team-1", credentials=authority.credentials(token="ops-secret")):
        seen = {
            name: _value(_scrape(url, f"{name}-secret", authority.ca)[1], "job_ranks", job_name="team-1")
            for name in ("ops", "team", "other")
        }
    assert seen == {"ops": 1, "team": 1, "other": None}
    samples = _scrape(url, "ops-secret", authority.ca)[1]
    assert (_value(samples, "certificate_expiry_timestamp_seconds") or 0) > time.time()
    for token in (None, "wrong-secret"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            _scrape(url, token, authority.ca)
        assert refused.value.code == 401
        assert "token" in refused.value.read().decode()
    after = _scrape(url, "ops-secret", authority.ca)[1]
    assert _value(after, "refused_calls_total", reason="unauthenticated") == 2
    with pytest.raises((urllib.error.URLError, OSError)):
        _scrape(url.replace("https", "http"))


def test_who_connects_to_the_metrics_and_is_mute_holds_up_nobody(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Eight may; one more is sent away at once, and when they are gone, or have been silent for 5 s, there is room."""
    log = tmp_path / "log"
    service = serve("--metrics", "127.0.0.1:0", "--log-file", str(log))
    url = _said(log, "metrics: ")
    host, _, port = url.removeprefix("http://").removesuffix("/metrics").partition(":")
    mute = [socket.create_connection((host, int(port)), timeout=_LONG_S) for _ in range(8)]
    with socket.create_connection((host, int(port)), timeout=_LONG_S) as ninth:
        assert ninth.recv(1) == b""
        mute[0].setblocking(False)
        with pytest.raises(BlockingIOError):  # and that was not for its silence, as this one has been silent for longer
            mute[0].recv(1)
        mute[0].settimeout(_LONG_S)
    with _world(service.address) as world:
        _train(world, 3)
    for number, one in enumerate(mute):
        with one:
            assert number < 4 or one.recv(1) == b""  # the service closes it

    def is_served() -> bool:
        try:
            return bool(_scrape(url)[1])
        except (urllib.error.URLError, OSError):
            return False

    _until(is_served)
    for path, code in (("", 404), ("/metrics/../x", 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            _scrape(url.removesuffix("/metrics") + path)
        assert refused.value.code == code
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


# ---- bnlayer jobs ----


def _jobs(address: str, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bnworker.cli", "jobs", "--address", address, *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=150, check=False, env={"COLUMNS": "150", **environ}
    )


def test_jobs_marks_the_straggler(serve: Callable[..., Any]) -> None:
    """The rank that others wait for now, in the table and for programs; what a peer named moves no cursor."""
    service = serve()
    assert _jobs(service.address).stdout.splitlines()[1].strip() == "no job runs"
    go = threading.Event()

    def second(world: World) -> None:
        _train(world, 2)
        go.wait(_LONG_S)
        world.barrier()

    with _pair(service.address, second, "odd\x1b[2J\njob") as world:
        _train(world, 2)
        waiting = threading.Thread(target=world.barrier, daemon=True)
        waiting.start()
        with grpc.insecure_channel(service.address, CLIENT_OPTIONS) as channel:
            stub = rpc.ObservationServiceStub(channel)

            def is_marked() -> bool:
                (answer,) = stub.ListJobs(pb.ListJobsRequest(), timeout=_LONG_S)
                return [rank.straggler for rank in answer.job.ranks] == [False, True]

            _until(is_marked)
        table, as_json = _jobs(service.address), _jobs(service.address, "--json")
        go.set()
        waiting.join(_LONG_S)
    assert (table.returncode, table.stderr, as_json.returncode) == (0, "", 0)
    lines = table.stdout.splitlines()
    assert lines[0].split("  ")[0] == "job"
    named = "odd\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}job"
    assert lines[1].split() == [named, "running", "2", "4", "barrier", "0"]
    assert "waiting for" in lines[2]
    assert "◀ straggler, awaited for" in lines[3]
    (job,) = json.loads(as_json.stdout)["jobs"]
    assert (job["job"], job["state"], job["world_size"], job["version"]) == ("odd\x1b[2J\njob", "running", 2, 2)
    assert (job["operation"], job["layer"], job["direction"], job["step"]) == ("barrier", None, None, 0)
    waiting_rank, straggler = job["ranks"]
    assert waiting_rank["waited_s"] >= waiting_rank["waiting_s"] >= 2.0
    assert straggler["held_up_s"] >= straggler["awaited_s"] >= 2.0
    assert (waiting_rank["straggler"], straggler["straggler"]) == (False, True)


def test_jobs_is_watched_until_ctrl_c(serve: Callable[..., Any]) -> None:
    """An object a line; and the end is no failure."""
    service = serve()
    command = [sys.executable, "-m", "bnworker.cli", "jobs", "--address", service.address, "--json", "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [json.loads(process.stdout.readline()) for _ in range(2)] == [{"jobs": []}] * 2
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=150)
    assert (process.returncode, errors) == (0, "")


def test_jobs_of_a_token(serve: Callable[..., Any], tmp_path: Path) -> None:
    """A reader sees its own; without a token nobody sees anything, and nothing that answers is an error of its own."""
    tokens = tmp_path / "tokens.toml"
    tokens.touch(0o600)
    tokens.write_text(
        entry("team", "team-secret", ["team-*"], Role.WORKER) + entry("eval", "eval-secret", ["eval-*"], Role.READER)
    )
    service = serve("--tokens", str(tokens))
    with _world(service.address, job="team-1", credentials=Credentials("team-secret")):
        seen = {
            name: [job["job"] for job in json.loads(done.stdout)["jobs"]]
            for name in ("team", "eval")
            for done in [_jobs(service.address, "--json", BNLAYER_TOKEN=f"{name}-secret")]
        }
        refused = _jobs(service.address)
    assert seen == {"team": ["team-1"], "eval": []}
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("bnlayer: jobs: This service asks for a token, and received none.")
    assert service.end(signal.SIGTERM)[0] == 0
    gone = _jobs(service.address)
    assert gone.returncode == 1
    assert gone.stderr.startswith(f"bnlayer: jobs: {service.address} does not answer: UNAVAILABLE: ")


# ---- follow ----


def _bits(found: MovingStatistics) -> tuple[int, bytes, bytes]:
    return found.version, found.mean.tobytes(), found.variance.tobytes()


def _owned(layer: BatchNormalization) -> tuple[int, bytes, bytes]:
    state = layer.state
    return state.version, state.moving.mean.tobytes(), state.moving.variance.tobytes()


@pytest.mark.parametrize("durable", [True, False])
def test_a_reader_sees_the_owners_bits_and_a_slow_one_the_latest(
    serve: Callable[..., Any], tmp_path: Path, durable: bool
) -> None:
    """It misses what it had no time for, and nobody waits for it; at the end of the job its values end."""
    service = serve(*(("--state-dir", str(tmp_path)) if durable else ()))
    with _world(service.address) as world:
        layer = _train(world, 1)
        values = follow("job", service.address, interval=0)
        assert _bits(next(values)) == _owned(layer)
        for step in range(50):
            layer(_X + step, training=True)
        assert _bits(next(values)) == _owned(layer)
        layer(_X, training=True)
    assert [_bits(found) for found in values] == [_owned(layer)]
    # Over, and with a state directory in a file alone: what it ended with.
    assert [_bits(found) for found in follow("job", service.address)] == [_owned(layer)]
    assert list(follow("job", service.address, layers=["other"])) == []
    with pytest.raises(ServiceError, match=r"knows no job 'nob'\. Compare the name with `bnlayer jobs`; to wait"):
        list(follow("nob", service.address))
    assert service.end(signal.SIGTERM)[0] == 0


def test_a_reader_goes_on_forever(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Before the job begins, from one run to the next, and while the service is started again."""
    flags = ("--state-dir", str(tmp_path / "state"))
    service = serve(*flags)
    seen: list[tuple[int, bytes, bytes]] = []
    failed: list[Exception] = []

    def read() -> None:
        try:
            seen.extend(map(_bits, follow("job", service.address, interval=0, forever=True, timeout=_LONG_S)))
        except ServiceError as error:
            failed.append(error)

    def run(address: str) -> None:
        with _world(address) as world:
            layer = _train(world, 1)
            _until(lambda: bool(seen) and seen[-1] == _owned(layer))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    run(service.address)
    run(service.address)
    code, _, _ = service.end(signal.SIGTERM)
    assert code == 0
    again = serve(*flags, "--listen", service.address)
    run(again.address)
    assert failed == []
    assert reader.is_alive()


def test_a_large_layer_travels_in_parts(serve: Callable[..., Any]) -> None:
    """gRPC refuses messages above 4 MiB."""
    service = serve()
    x = np.random.default_rng(1).standard_normal((2, 2**20)).astype(np.float32)
    with _world(service.address) as world:
        layer = BatchNormalization(synchronized=True, name="a", collective=world)
        layer(x, training=True)
        assert _bits(next(follow("job", service.address))) == _owned(layer)


def test_a_reader_needs_the_role_of_one_and_its_job(serve: Callable[..., Any], tmp_path: Path) -> None:
    """And no more."""
    tokens = tmp_path / "tokens.toml"
    tokens.touch(0o600)
    tokens.write_text(
        entry("team", "team-secret", ["job"], Role.WORKER)
        + entry("eval", "eval-secret", ["job"], Role.READER)
        + entry("else", "else-secret", ["else"], Role.ADMIN)
    )
    service = serve("--tokens", str(tokens))
    with _world(service.address, credentials=Credentials("team-secret")) as world:
        layer = _train(world, 2)
        assert _bits(next(follow("job", service.address, token="eval-secret"))) == _owned(layer)
        for token, error in ((None, "asks for a token, and received none"), ("else-secret", "is not for job 'job'")):
            with pytest.raises(ServiceError, match=error):
                next(follow("job", service.address, token=token))


def test_a_service_that_stays_away(serve: Callable[..., Any]) -> None:
    """It is tried again for as long as the reader says, and told to wait no longer when it stops."""
    service = serve()
    values = follow("job", service.address, forever=True, timeout=0)
    errors: list[str] = []

    def read() -> None:
        try:
            next(values)
        except ServiceError as error:
            errors.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with grpc.insecure_channel(service.address, CLIENT_OPTIONS) as channel:
        list(rpc.ObservationServiceStub(channel).ListJobs(pb.ListJobsRequest(), timeout=_LONG_S))
    assert service.end(signal.SIGTERM)[0] == 0
    reader.join(_LONG_S)
    (error,) = errors
    assert error.startswith(f"The service at {service.address} does not answer: ")
    assert error.endswith(". No answer for 0 s.")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"address": None}, r"follow: missing address= \(or BNLAYER_ADDRESS\) of a service\."),
        ({"job": None}, r"follow: missing job= \(or BNLAYER_JOB\)\."),
        ({"address": "::1:5"}, r"follow\(address=\): expected HOST:PORT, such as 127.0.0.1:50051, received '::1:5'"),
        ({"interval": -1}, r"follow\(interval=\): expected a number of seconds, 0 or more, received -1\."),
        ({"timeout": float("nan")}, r"follow\(timeout=\): expected a number of seconds, 0 or more, received nan\."),
        ({"layers": "bn1"}, r"follow\(layers=\): expected a list of names, received 'bn1'; write \['bn1'\]\."),
    ],
)
def test_arguments_are_refused_at_once(arguments: dict[str, Any], error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the first value."""
    for name in ("BNLAYER_ADDRESS", "BNLAYER_JOB"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=error):
        follow(**{"job": "job", "address": "127.0.0.1:1", **arguments})
