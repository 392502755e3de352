"""The daemon from outside: how it starts, what it refuses, how it ends, and what outlives it."""

import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from bnlayer import BatchNormalization, PeerLostError, ServiceError
from bnproto.grpc_options import CLIENT_OPTIONS, SERVICE_NAME
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver import daemon
from bnserver.__main__ import USAGE, main
from bnserver.authorization import Role, entry
from bnworker import CheckpointError, World
from bnworker.cli.commands import app
from bnworker.transports.service import ServiceTransport

pytestmark = pytest.mark.rpc

_X = np.arange(12, dtype=np.float32).reshape(6, 2)
_JOIN = pb.Join(job="j", world_size=1, incarnation=1, timeout_ms=600_000, join_timeout_ms=600_000)


def _world(address: str, rank: int = 0, world_size: int = 1, timeout: float = 60.0) -> World:
    return World(ServiceTransport(address, "job", rank, world_size, timeout=timeout), install=False)


def _trained(address: str, steps: int) -> tuple[bytes, int]:
    """The owner's statistics after a run of some steps."""
    with _world(address) as world:
        layer = BatchNormalization(synchronized=True, name="a", collective=world)
        for step in range(steps):
            layer(_X + step, training=True)
        world.pull(layer)
        state = layer.state
        return state.moving.mean.tobytes() + state.moving.variance.tobytes(), state.version


def _refused(start: Callable[..., Any], *arguments: str) -> tuple[int, str]:
    code, out, err = start("-m", "bnserver", *arguments).end(within=150)
    assert out == ""
    return code, err


@pytest.fixture
def usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is said of wrong arguments, in this process: it gets no further than reading them."""

    def read(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bnserver", *arguments])
        monkeypatch.setattr(daemon, "serve", lambda _: pytest.fail("it would serve"))
        assert main() == USAGE
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return read


# ---- quotas ----


@pytest.mark.parametrize("local_socket", [True, False])
def test_the_error_names_the_quota_that_was_exceeded(serve: Callable[..., Any], local_socket: bool) -> None:
    """At once and whatever its timeout, with the setting that raises it; the job beside it goes on."""
    quotas = ("--max-jobs=2", "--max-ranks=2", "--max-layers=1", "--max-channels=4")
    address = serve(*quotas, "--max-job-bytes=4MiB").address

    def joined(job: str, rank: int = 0, world_size: int = 1) -> World:
        transport = ServiceTransport(address, job, rank, world_size, timeout=600.0, local_socket=local_socket)
        return World(transport, install=False)

    def called(job: str, channels: int, *names: str) -> None:
        with joined(job) as world:
            for name in names:
                layer = BatchNormalization(synchronized=True, name=name, collective=world)
                layer(np.ones((2, channels), np.float32), training=True)

    def reduced() -> None:
        with joined("large") as world:
            world.allreduce([np.zeros(2**20)])

    with joined("calm") as calm:
        calm.barrier()
        called("as many as permitted", 4, "a")
        for exceeds, text in (
            (
                lambda: called("wide", 5, "a"),
                "at most 4 channels of a layer, received a request for 5; the service's --",
            ),
            (lambda: called("deep", 4, "a", "b"), "at most 1 layers of a job, received a request for 2"),
            (lambda: joined("many", 0, 3), "at most 2 ranks of a job, received a request for 3"),
            (reduced, "at most 4194304 bytes in flight of a job, received a request for 8388608"),
        ):
            with pytest.raises(ServiceError, match=re.escape(text)):
                exceeds()
            calm.barrier()
        with joined("second") as second:
            with pytest.raises(ServiceError, match="job 'third': expected at most 2 jobs at a time"):
                joined("third")
            second.barrier()
        calm.barrier()


def test_a_connection_too_many_is_refused(serve: Callable[..., Any]) -> None:
    """Those that are open stay."""
    address = serve("--max-connections=1").address
    with _world(address) as world:
        with pytest.raises(ServiceError, match="expected at most 1 connections, received a request for 2"):
            ServiceTransport(address, "other", 0, 1, timeout=600.0)
        world.barrier()


@pytest.mark.slow
def test_a_connection_that_says_nothing_ends(serve: Callable[..., Any]) -> None:
    """Long before gRPC's own two minutes: each takes a file of the service."""
    host, _, port = serve().address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30.0) as mute:
        while mute.recv(4096):  # what HTTP/2 begins with
            pass


@pytest.mark.parametrize("first", [b"", pb.ExchangeRequest(join=_JOIN).SerializeToString()], ids=["first", "joined"])
@pytest.mark.parametrize("with_tokens", [False, True])
def test_what_is_no_message_is_refused_at_once(
    serve: Callable[..., Any], tmp_path: Path, first: bytes, with_tokens: bool
) -> None:
    """The reading of the stream ended in silence: seconds later its rank was said to have frozen."""
    tokens = tmp_path / "tokens.toml"
    tokens.touch(0o600)
    tokens.write_text(entry("ops", "secret", ["*"], Role.ADMIN))
    flags = ["--lease", "0", *(["--tokens", str(tokens)] if with_tokens else [])]
    hang_up = threading.Event()

    def sent() -> Iterator[bytes]:
        if first:
            yield first
        yield b"\xff\xff\xff"
        hang_up.wait()

    with grpc.insecure_channel(serve(*flags).address, CLIENT_OPTIONS) as channel:
        call: Any = channel.stream_stream(f"/{SERVICE_NAME}/Exchange")
        try:
            with pytest.raises(grpc.RpcError) as raised:
                list(call(sent(), timeout=150, metadata=[("authorization", "Bearer secret")]))
        finally:
            hang_up.set()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Error parsing message with type 'bnproto.v1.ExchangeRequest'" in str(raised.value)


def test_the_service_may_open_as_many_files_as_the_system_allows(serve: Callable[..., Any]) -> None:
    """Each connection takes one, strangers' too; with the usual 1024, they took those of the journals."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        service = serve()
        assert resource.prlimit(service.popen.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- starting ----


def test_ready_file_and_line_say_the_same(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Launchers read either; the file appears as a whole, when ranks can join."""
    ready = tmp_path / "address"
    service = serve("--ready-file", str(ready))
    assert ready.read_text(encoding="utf-8") == service.address
    assert list(tmp_path.iterdir()) == [ready]
    with _world(service.address) as world:
        world.barrier()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "example.org:50051"])
def test_plain_text_beyond_this_machine_must_be_asked_for(start: Callable[..., Any], listen: str) -> None:
    """Secure by default: anybody who reaches the port could join any job."""
    code, err = _refused(start, "--listen", listen)
    assert code == 2
    assert f"bnserver: {listen} is reachable from other machines" in err
    assert "say --insecure if the network is your own" in err


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.1:", ":50051", "127.0.0.1:http", "127.0.0.1:65536"])
def test_an_address_has_a_host_and_a_port(usage_error: Callable[..., str], listen: str) -> None:
    """A typing error is told as one."""
    err = usage_error("--listen", listen)
    assert f"--listen: expected HOST:PORT, such as 127.0.0.1:50051, received {listen!r}" in err


def test_an_ipv6_host_is_in_brackets(start: Callable[..., Any]) -> None:
    """It listened somewhere that nobody could name."""
    code, err = _refused(start, "--listen", "::1:0")
    assert code == 2
    assert err == (
        "bnserver: --listen: expected HOST:PORT, such as 127.0.0.1:50051, received '::1:0'. An IPv6 host stands in "
        "brackets: [::1]:0.\n"
    )


@pytest.mark.parametrize("flag", ["--lease", "--away"])
@pytest.mark.parametrize("seconds", ["-1", "inf", "nan", "soon"])
def test_timeouts_are_numbers_of_seconds(usage_error: Callable[..., str], flag: str, seconds: str) -> None:
    """A lease that is none would find everybody dead, or nobody."""
    err = usage_error("--listen", "127.0.0.1:0", f"{flag}={seconds}")
    assert f"bnserver: {flag}: expected a number of seconds, 0 or more, received '{seconds}'" in err


def test_insecure_listens_everywhere(start: Callable[..., Any]) -> None:
    """Where the network is one's own."""
    service = start("-m", "bnserver", "--listen", "0.0.0.0:0", "--insecure")
    port = service.line().rpartition(":")[2]
    with _world(f"127.0.0.1:{port}") as world:
        world.barrier()


def test_a_port_in_use_is_reported(serve: Callable[..., Any], start: Callable[..., Any]) -> None:
    """By default gRPC would share the port between two daemons, silently."""
    address = serve().address
    code, err = _refused(start, "--listen", address)
    assert code == 1
    assert f"bnserver: Can't listen on {address}:" in err
    assert "Another process may hold the port" in err


def test_a_state_directory_has_one_daemon(serve: Callable[..., Any], start: Callable[..., Any], tmp_path: Path) -> None:
    """Two owners of the same statistics would overwrite each other; the second is told who holds them."""
    first = serve("--state-dir", str(tmp_path))
    code, err = _refused(start, "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path))
    assert code == 1
    holder = f"pid {first.popen.pid} on host {socket.gethostname()}"
    assert f"bnserver: The state directory {tmp_path} is in use by {holder}." in err


def test_a_lock_ends_with_its_daemon(serve: Callable[..., Any], tmp_path: Path) -> None:
    """After kill -9 the next daemon starts: the kernel gave the lock back."""
    first = serve("--state-dir", str(tmp_path))
    first.end(signal.SIGKILL)
    serve("--state-dir", str(tmp_path))


def test_a_corrupt_snapshot_stops_the_start(
    serve: Callable[..., Any], start: Callable[..., Any], tmp_path: Path
) -> None:
    """Moving statistics are never lost silently: the file is named, and left as it is."""
    service = serve("--state-dir", str(tmp_path))
    _trained(service.address, 2)
    service.end(signal.SIGTERM)
    (path,) = tmp_path.glob("*.job")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, err = _refused(start, "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path))
    assert code == 1
    assert f"bnserver: The snapshot {path} is corrupt: the checksum of record " in err
    assert path.read_bytes() == data


def test_help_teaches(start: Callable[..., Any]) -> None:
    """The flags, an example of each use, the exit codes."""
    code, out, _ = start("-m", "bnserver", "--help").end(within=150)
    assert code == 0
    for word in (
        "--listen HOST:PORT",
        "--state-dir DIR",
        "--lease SECONDS",
        "--away SECONDS",
        "--insecure",
        "--ready-file PATH",
        "exit codes:",
    ):
        assert word in out


# ---- health ----


def test_health_says_when_ranks_can_join(serve: Callable[..., Any]) -> None:
    """For the whole server and for the service by name; an unknown service is unknown."""
    with grpc.insecure_channel(serve().address, CLIENT_OPTIONS) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # its types lack the calls
        for name in ("", SERVICE_NAME):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            health.Check(health_pb2.HealthCheckRequest(service="else"), timeout=60)


# ---- ending, and what outlives it ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_tells_waiting_ranks_and_ends_in_time(serve: Callable[..., Any], number: int) -> None:
    """Whoever waits is told why, at once; the daemon exits 0 within 5 s."""
    service = serve()
    reported: list[ServiceError] = []

    def waits(rank: int) -> None:
        world = _world(service.address, rank, 3)
        try:
            if rank != 2:
                world.barrier()
            else:
                parked.wait(150)
        except ServiceError as error:
            reported.append(error)
        world.leave()

    parked = threading.Event()
    ranks = [threading.Thread(target=waits, args=(rank,), daemon=True) for rank in range(3)]
    for rank in ranks:
        rank.start()
    _until_stderr(service, "3 ranks")
    begin = time.monotonic()
    code, _, _ = service.end(number)
    assert code == 0
    assert time.monotonic() - begin < 5.0
    parked.set()
    for rank in ranks:
        rank.join(150)
    text = "The service is stopping. Start the job again once it is back; its statistics are kept by --state-dir."
    assert [(str(error), error.ranks) for error in reported] == [(text, ())] * 2


def test_statistics_outlive_a_drain(serve: Callable[..., Any], tmp_path: Path) -> None:
    """A run over two daemons gives the bits of a run over one."""
    first = serve("--state-dir", str(tmp_path / "two"))
    _trained(first.address, 3)
    assert first.end(signal.SIGTERM)[0] == 0
    second = serve("--state-dir", str(tmp_path / "two"))
    got = _trained(second.address, 2)
    uninterrupted = serve("--state-dir", str(tmp_path / "one"))
    _trained(uninterrupted.address, 3)
    assert got == _trained(uninterrupted.address, 2)
    assert got[1] == 5


def _on_both(address: str, steps: Callable[[World, BatchNormalization], Any], *, trained: bool = True) -> list[Any]:
    """The same steps on two ranks, which are threads; what each returned or raised."""
    results: list[Any] = [None, None]

    def rank(number: int) -> None:
        try:
            with _world(address, number, 2) as world:
                layer = BatchNormalization(synchronized=True, name="a", collective=world)
                layer.build((None, 2))
                if trained:
                    layer(_X + number, training=True)
                else:
                    world.pull(layer)
                results[number] = steps(world, layer)
        except BaseException as error:  # noqa: BLE001 - what a thread raised is one of the results
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    return results


def test_a_job_goes_back_to_a_checkpoint(serve: Callable[..., Any], tmp_path: Path) -> None:
    """It is on disk when the call returns: the daemon is killed; restored, the job goes on with the same bits."""

    def steps(world: World, layer: BatchNormalization) -> tuple[bytes, bytes]:
        world.checkpoint("early", step=1)
        layer(_X * 3, training=True)
        world.checkpoint("late", step=2)
        kept = _bits(layer)
        layer(_X * 5, training=True)
        return kept, _bits(layer)

    service = serve("--state-dir", str(tmp_path), "--keep-checkpoints=1")
    (kept, expected), other = _on_both(service.address, steps)
    assert other == (kept, expected)
    service.end(signal.SIGKILL)
    shown = CliRunner().invoke(app, ["state", "checkpoints", "job", "--json", "--state-dir", str(tmp_path)])
    assert [(each["checkpoint"], each["step"]) for each in json.loads(shown.stdout)] == [("late", 2)]
    restored = CliRunner().invoke(app, ["state", "restore", "job", "late", "--state-dir", str(tmp_path)])
    assert restored.stdout == "job 'job': 1 layers of checkpoint 'late', step 2\n"

    def one_more_step(world: World, layer: BatchNormalization) -> tuple[bytes, bytes]:
        before = _bits(layer)
        layer(_X * 5, training=True)
        return before, _bits(layer)

    assert _on_both(serve("--state-dir", str(tmp_path)).address, one_more_step, trained=False) == [(kept, expected)] * 2


@pytest.mark.parametrize(
    ("durable", "text"),
    [
        (True, "expected at most 1 checkpoints of a job, received a request for 2"),
        (False, "has no state directory"),
    ],
)
def test_a_checkpoint_that_is_not_kept_ends_nothing(
    durable: bool, text: str, serve: Callable[..., Any], tmp_path: Path
) -> None:
    """Every rank is told, and goes on."""

    def steps(world: World, layer: BatchNormalization) -> str:
        if durable:
            world.checkpoint("first", step=1)
        with pytest.raises(CheckpointError) as raised:
            world.checkpoint("second", step=2)
        layer(_X, training=True)
        return str(raised.value)

    arguments = ("--state-dir", str(tmp_path), "--max-checkpoints=1") if durable else ()
    first, second = _on_both(serve(*arguments).address, steps)
    assert first == second
    assert text in first


def _bits(layer: BatchNormalization) -> bytes:
    return b"".join(array.tobytes() for array in layer.state.arrays().values())


def test_what_the_last_rank_left_behind_outlives_kill_9(serve: Callable[..., Any], tmp_path: Path) -> None:
    """When `leave` returns on the last rank, the job is on disk."""
    first = serve("--state-dir", str(tmp_path))
    before = _trained(first.address, 3)
    first.end(signal.SIGKILL)
    second = serve("--state-dir", str(tmp_path))
    with _world(second.address) as world:
        state = ServiceTransport.pull(world._transport, "a")  # type: ignore[arg-type]  # below the layer: what is owned
        assert state is not None
        assert (state.moving.mean.tobytes() + state.moving.variance.tobytes(), state.version) == before


def test_without_a_state_directory_nothing_stays(serve: Callable[..., Any]) -> None:
    """In memory alone: another daemon knows nothing of the job."""
    first = serve()
    _trained(first.address, 1)
    first.end(signal.SIGTERM)
    assert _trained(serve().address, 1)[1] == 1


def test_a_full_disk_is_reported(serve: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A job that can't be saved is no orderly end, which its last rank hears; what was saved before is still there."""
    service = serve("--state-dir", str(tmp_path))
    _trained(service.address, 1)
    (path,) = tmp_path.glob("*.job")
    before = path.read_bytes()
    path.with_suffix(".part").mkdir()  # stands in the way of the next write
    assert not [text for text in caplog.messages if "confirm" in text]
    _trained(service.address, 1)
    assert caplog.messages[-1].startswith(
        f"rank 0 has left job 'job', but the service at {service.address} did not confirm that its job is on disk: Job "
        f"'job' could not be saved to {path}: "
    )
    code, _, err = service.end(signal.SIGTERM)
    assert code == 1
    assert f"bnserver: Job 'job' could not be saved to {path}:" in err
    assert path.read_bytes().startswith(before)


def test_the_next_generation_goes_on_after_a_lost_rank(serve: Callable[..., Any], run_rank: Callable[..., Any]) -> None:
    """One job, two attempts: the second begins with what the first one completed."""
    service = serve()
    lost = run_rank(service.address, 1, 2, "time.sleep(60)")
    with _world(service.address, 0, 2) as world:
        assert lost.line() == "joined"
        lost.end(signal.SIGKILL)
        with pytest.raises(PeerLostError):
            world.barrier()
    assert _trained(service.address, 2)[1] == 2


def test_a_log_that_nobody_reads_holds_up_nobody(serve: Callable[..., Any]) -> None:
    """A full pipe must neither stop the ranks nor the end."""
    service = serve()
    wrong = pb.ExchangeRequest(join=pb.Join(job="x" * 201))
    with grpc.insecure_channel(service.address, CLIENT_OPTIONS) as channel:
        exchange = rpc.StatisticsServiceStub(channel).Exchange
        for _ in range(500):  # refusals of some 150 bytes: more than a pipe holds
            with pytest.raises(grpc.RpcError, match="expected a job name of 1 to 200 characters"):
                next(exchange(iter([wrong])))
    with _world(service.address) as world:
        world.barrier()
    service.signal(signal.SIGTERM)
    assert service.popen.wait(150) == 0


def _until_stderr(process: Any, text: str) -> None:
    """Read the log until a line holds a text."""
    pipe = process.popen.stderr
    while text not in (line := pipe.readline()):
        assert line, f"the log ended without {text!r}"


def test_no_process_is_left_behind(serve: Callable[..., Any]) -> None:
    """The daemon has no children: killing it is enough."""
    pid = serve().popen.pid
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""
    assert os.getpgid(pid) == os.getpgid(0)
