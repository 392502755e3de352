"""Those who look on: `bnlayer jobs`, and readers of moving statistics. None of them is a rank."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bnlayer import BatchNormalization, ServiceError
from bnproto.credentials import Credentials
from bnproto.grpc_options import CLIENT_OPTIONS
from bnproto.v1 import observation_pb2 as pb
from bnproto.v1 import observation_pb2_grpc as rpc
from bnserver.authorization import Role, entry
from bnworker import MovingStatistics, World, follow
from support.looking_on import LONG_S, X, joined, paired, train, until

pytestmark = pytest.mark.rpc


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
        train(world, 2)
        go.wait(LONG_S)
        world.barrier()

    with paired(service.address, second, "odd\x1b[2J\njob") as world:
        train(world, 2)
        waiting = threading.Thread(target=world.barrier, daemon=True)
        waiting.start()
        with grpc.insecure_channel(service.address, CLIENT_OPTIONS) as channel:
            stub = rpc.ObservationServiceStub(channel)

            def is_marked() -> bool:
                (answer,) = stub.ListJobs(pb.ListJobsRequest(), timeout=LONG_S)
                waits = answer.job.ranks[0].waiting_s > 1  # less is not worth a word in the table
                return waits and [rank.straggler for rank in answer.job.ranks] == [False, True]

            until(is_marked)
        table, as_json = _jobs(service.address), _jobs(service.address, "--json")
        go.set()
        waiting.join(LONG_S)
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
    with joined(service.address, job="team-1", credentials=Credentials("team-secret")):
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
    unreachable = _jobs(service.address)
    assert unreachable.returncode == 1
    assert unreachable.stderr.startswith(f"bnlayer: jobs: {service.address} does not answer: UNAVAILABLE: ")


# ---- follow ----


def _bits(statistics: MovingStatistics) -> tuple[int, bytes, bytes]:
    return statistics.version, statistics.mean.tobytes(), statistics.variance.tobytes()


def _owned(layer: BatchNormalization) -> tuple[int, bytes, bytes]:
    state = layer.state
    return state.version, state.moving.mean.tobytes(), state.moving.variance.tobytes()


@pytest.mark.parametrize("durable", [True, False])
def test_a_reader_sees_the_owners_bits_and_a_slow_one_the_latest(
    serve: Callable[..., Any], tmp_path: Path, durable: bool
) -> None:
    """It misses what it had no time for, and nobody waits for it; at the end of the job its values end."""
    service = serve(*(("--state-dir", str(tmp_path)) if durable else ()))
    with joined(service.address) as world:
        layer = train(world, 1)
        values = follow("job", service.address, interval=0)
        assert _bits(next(values)) == _owned(layer)
        for step in range(50):
            layer(X + step, training=True)
        assert _bits(next(values)) == _owned(layer)
        layer(X, training=True)
    assert [_bits(statistics) for statistics in values] == [_owned(layer)]
    # Over, and with a state directory in a file alone: what it ended with.
    assert [_bits(statistics) for statistics in follow("job", service.address)] == [_owned(layer)]
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
            seen.extend(map(_bits, follow("job", service.address, interval=0, forever=True, timeout=LONG_S)))
        except ServiceError as error:
            failed.append(error)

    def run(address: str) -> None:
        with joined(address) as world:
            layer = train(world, 1)
            until(lambda: bool(seen) and seen[-1] == _owned(layer))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    run(service.address)
    run(service.address)
    code, _, _ = service.end(signal.SIGTERM)
    assert code == 0
    restarted = serve(*flags, "--listen", service.address)
    run(restarted.address)
    assert failed == []
    assert reader.is_alive()


def test_a_large_layer_travels_in_parts(serve: Callable[..., Any]) -> None:
    """gRPC refuses messages above 4 MiB."""
    service = serve("--max-channels", str(2**20))
    x = np.random.default_rng(1).standard_normal((2, 2**20)).astype(np.float32)
    with joined(service.address) as world:
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
    with joined(service.address, credentials=Credentials("team-secret")) as world:
        layer = train(world, 2)
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
        list(rpc.ObservationServiceStub(channel).ListJobs(pb.ListJobsRequest(), timeout=LONG_S))
    assert service.end(signal.SIGTERM)[0] == 0
    reader.join(LONG_S)
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
