"""The daemon from outside: how it starts, what it refuses to start with, and how it ends."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bnlayer import ServiceError
from bnproto.grpc_options import CLIENT_OPTIONS, SERVICE_NAME
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver import daemon
from bnserver.__main__ import USAGE, main
from support.looking_on import joined

pytestmark = pytest.mark.rpc


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


# ---- starting ----


def test_ready_file_and_line_say_the_same(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Launchers read either; the file appears as a whole, when ranks can join."""
    ready = tmp_path / "address"
    service = serve("--ready-file", str(ready))
    assert ready.read_text(encoding="utf-8") == service.address
    assert list(tmp_path.iterdir()) == [ready]
    with joined(service.address) as world:
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
    with joined(f"127.0.0.1:{port}") as world:
        world.barrier()


def test_a_port_in_use_is_reported(serve: Callable[..., Any], start: Callable[..., Any]) -> None:
    """By default gRPC would share the port between two daemons, silently."""
    address = serve().address
    code, err = _refused(start, "--listen", address)
    assert code == 1
    assert f"bnserver: Can't listen on {address}:" in err
    assert "Another process may hold the port" in err


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


# ---- ending ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_tells_waiting_ranks_and_ends_in_time(serve: Callable[..., Any], number: int) -> None:
    """Whoever waits is told why, at once; the daemon exits 0 within 5 s."""
    service = serve()
    reported: list[ServiceError] = []

    def waits(rank: int) -> None:
        world = joined(service.address, rank, 3)
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


def test_a_log_that_nobody_reads_holds_up_nobody(serve: Callable[..., Any]) -> None:
    """A full pipe must neither stop the ranks nor the end."""
    service = serve()
    wrong = pb.ExchangeRequest(join=pb.Join(job="x" * 201))
    with grpc.insecure_channel(service.address, CLIENT_OPTIONS) as channel:
        exchange = rpc.StatisticsServiceStub(channel).Exchange
        for _ in range(500):  # refusals of some 150 bytes: more than a pipe holds
            with pytest.raises(grpc.RpcError, match="expected a job name of 1 to 200 characters"):
                next(exchange(iter([wrong])))
    with joined(service.address) as world:
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
