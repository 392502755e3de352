"""The daemon: from the command line to a listening service, and to its orderly end.

In this order: lock the state directory, bind the port, load what was saved, report that it is ready; on SIGTERM or
SIGINT notify every rank, save every job, exit 0.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import secrets
import signal
import sys
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from bnlayer.files import write_atomically
from bnlayer.kernels import kernels
from bnproto.address import hint, split
from bnproto.channel import SAVING_NAME, SERVER_OPTIONS, SERVICE_NAME
from bnproto.credentials import refusal
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver.core.members import LivenessTimeouts
from bnserver.failpoints import FailpointError, Failpoints
from bnserver.logs import LogError, logged
from bnserver.servicer import Servicer
from bnserver.store import Store, StoreError

_GRACE_S = 2.0  # for ranks to be notified that the service stops; the whole drain has 5 s

OK, FAILED, USAGE = 0, 1, 2

_log = logging.getLogger("bnserver")


class ListenError(ValueError):
    """The address to listen on is invalid or not allowed; the text says why, and what to do."""


class UnavailableError(ValueError):
    """This version lacks a requested feature; the text names it, and says what to do."""


class StartError(RuntimeError):
    """The service can't start; the text says why, and what to do."""


def serve(
    listen: str,
    state_dir: Path | None = None,
    *,
    insecure: bool = False,
    ready_file: Path | None = None,
    timeouts: LivenessTimeouts | None = None,
    log_level: str = "info",
    log_file: Path | None = None,
) -> int:
    """Run the service until SIGTERM or SIGINT.

    Args:
        listen: HOST:PORT; port 0 takes a free one.
        state_dir: where jobs are kept; None keeps them in memory alone.
        insecure: allow plain text beyond this machine.
        ready_file: receives the address, HOST:PORT, once ranks can join.
        timeouts: how long it waits for signs of life of a rank.
        log_level: what stderr gets: debug, info, warning or error.
        log_file: gets the log from info on, whatever stderr gets; None: there is none.

    Returns:
        The exit code: 0 after an orderly end, 1 if the service could not start or save, 2 for a wrong address, or for
        credentials in the environment, which are not supported.
    """
    try:
        unavailable = refusal(os.environ)
        if unavailable is not None:
            raise UnavailableError(unavailable)
        host = _host(listen)
        if not insecure and not _loopback(host):
            raise ListenError(
                f"{listen} is reachable from other machines, and this service speaks plain text without a check of "
                "who joins. Listen on 127.0.0.1, or say --insecure if the network is your own."
            )
        with logged(log_level, log_file):
            kernels()  # before it listens: a variable that names none is known at once
            asyncio.run(_serve(listen, host, state_dir, ready_file, timeouts, Failpoints(os.environ)))
    except (ListenError, UnavailableError, FailpointError) as error:
        print(f"bnserver: {error}", file=sys.stderr)  # noqa: T201 - what a command says on its way out
        return USAGE
    except (LogError, StartError, StoreError) as error:
        print(f"bnserver: {error}", file=sys.stderr)  # noqa: T201 - what a command says on its way out
        return FAILED
    return OK


async def _serve(
    listen: str,
    host: str,
    state_dir: Path | None,
    ready_file: Path | None,
    timeouts: LivenessTimeouts | None,
    failpoints: Failpoints,
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # Batch systems announce a job's end by one of them, to every process of a step. The ranks act on it.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    store = Store(state_dir, failpoints) if state_dir is not None else None
    try:
        health_service = health.aio.HealthServicer()
        await _set_health(health_service, HealthCheckResponse.NOT_SERVING)

        async def say_whether_saving(saving: bool) -> None:
            status = HealthCheckResponse.SERVING if saving else HealthCheckResponse.NOT_SERVING
            await health_service.set(SAVING_NAME, status)

        await say_whether_saving(store is not None)
        exchanges = Servicer(
            secrets.randbits(63), store, timeouts=timeouts, failpoints=failpoints, saving=say_whether_saving
        )
        server = grpc.aio.server(options=SERVER_OPTIONS)
        rpc.add_StatisticsServiceServicer_to_server(exchanges, server)
        health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
        port = _bind(server, listen)
        await server.start()
        try:
            await exchanges.open(port)
            await _set_health(health_service, HealthCheckResponse.SERVING)
            _announce(f"{host}:{port}", ready_file)
            await stop.wait()
            _log.info("stopping: telling every rank, saving every job")
            await _set_health(health_service, HealthCheckResponse.NOT_SERVING)
            await exchanges.close()
        finally:
            await server.stop(_GRACE_S)
    finally:
        if store is not None:
            store.close()


def _host(listen: str) -> str:
    if split(listen) is None:
        raise ListenError(f"expected --listen HOST:PORT, such as 127.0.0.1:50051, received {listen!r}.{hint(listen)}")
    return listen.rpartition(":")[0]


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(server: grpc.aio.Server, listen: str) -> int:
    try:
        return server.add_insecure_port(listen)
    except RuntimeError as error:
        raise StartError(
            f"Can't listen on {listen}: {error}. Another process may hold the port, or the host is not this machine's. "
            "Stop that process, or listen elsewhere; port 0 takes a free one."
        ) from error


async def _set_health(servicer: health.aio.HealthServicer, status: int) -> None:
    # "" is the whole server, which the package would report as serving from the start.
    for service in ("", SERVICE_NAME):
        await servicer.set(service, status)


def _announce(address: str, ready_file: Path | None) -> None:
    if ready_file is not None:
        write_atomically(ready_file, address.encode())
    print(f"bnserver listening on {address}", flush=True)  # noqa: T201 - launchers read this line
