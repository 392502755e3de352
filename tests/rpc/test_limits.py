"""What the daemon takes of anybody: up to its quotas, and no bytes that are no message."""

import re
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bnlayer import BatchNormalization, ServiceError
from bnproto.grpc_options import CLIENT_OPTIONS, SERVICE_NAME
from bnproto.v1 import statistics_pb2 as pb
from bnserver.authorization import Role, entry
from bnworker import World
from bnworker.transports.service import ServiceTransport
from support.looking_on import joined

pytestmark = pytest.mark.rpc

_JOIN = pb.Join(job="j", world_size=1, incarnation=1, timeout_ms=600_000, join_timeout_ms=600_000)


@pytest.mark.parametrize("local_socket", [True, False])
def test_the_error_names_the_quota_that_was_exceeded(serve: Callable[..., Any], local_socket: bool) -> None:
    """At once and whatever its timeout, with the setting that raises it; the job beside it goes on."""
    quotas = ("--max-jobs=2", "--max-ranks=2", "--max-layers=1", "--max-channels=4")
    address = serve(*quotas, "--max-job-bytes=4MiB").address

    def member(job: str, rank: int = 0, world_size: int = 1) -> World:
        transport = ServiceTransport(address, job, rank, world_size, timeout=600.0, local_socket=local_socket)
        return World(transport, install=False)

    def called(job: str, channels: int, *names: str) -> None:
        with member(job) as world:
            for name in names:
                layer = BatchNormalization(synchronized=True, name=name, collective=world)
                layer(np.ones((2, channels), np.float32), training=True)

    def reduced() -> None:
        with member("large") as world:
            world.allreduce([np.zeros(2**20)])

    with member("calm") as calm:
        calm.barrier()
        called("as many as permitted", 4, "a")
        for exceeds, text in (
            (
                lambda: called("wide", 5, "a"),
                "at most 4 channels of a layer, received a request for 5; the service's --",
            ),
            (lambda: called("deep", 4, "a", "b"), "at most 1 layers of a job, received a request for 2"),
            (lambda: member("many", 0, 3), "at most 2 ranks of a job, received a request for 3"),
            (reduced, "at most 4194304 bytes in flight of a job, received a request for 8388608"),
        ):
            with pytest.raises(ServiceError, match=re.escape(text)):
                exceeds()
            calm.barrier()
        with member("second") as second:
            with pytest.raises(ServiceError, match="job 'third': expected at most 2 jobs at a time"):
                member("third")
            second.barrier()
        calm.barrier()


def test_a_connection_too_many_is_refused(serve: Callable[..., Any]) -> None:
    """Those that are open stay."""
    address = serve("--max-connections=1").address
    with joined(address) as world:
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
