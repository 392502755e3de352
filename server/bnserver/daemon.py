"""The daemon: from its configuration to a listening service, and to its orderly end.

In this order: read certificates and tokens, lock the state directory, bind the port, load what was saved, report
that it is ready; on SIGTERM or SIGINT notify every rank, save every job, exit 0. SIGHUP reads certificates and
tokens anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import secrets
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from bnlayer.files import write_atomically
from bnlayer.kernels import kernels
from bnproto.grpc_options import OBSERVATION_NAME, SAVING_NAME, SERVER_OPTIONS, SERVICE_NAME
from bnproto.v1 import observation_pb2_grpc as observation_rpc
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver.admission import Admission
from bnserver.authorization import TokensError
from bnserver.configuration import Configuration, ConfigurationError
from bnserver.core.members import LivenessTimeouts
from bnserver.failpoints import FailpointError, Failpoints
from bnserver.health import Health
from bnserver.job_file import StoreError
from bnserver.logs import LogError, logged
from bnserver.observing import ObservationServicer
from bnserver.reloading import Reloading, read_tokens
from bnserver.retention import Keep
from bnserver.servicer import Servicer
from bnserver.store import Store
from bnserver.tls import CertificateError, Certificates, Files, load

if TYPE_CHECKING:
    from bnserver.metrics_endpoint import Endpoint
    from bnserver.page.endpoint import Dashboard

_GRACE_S = 2.0  # for ranks to be notified that the service stops; the whole drain has 5 s
_SOON_DAYS = 14  # a certificate that ends within so many is a warning at the start

_OCCUPIED = (
    "Can't listen on {}: {}. Another process may hold the port, or the host is not this machine's. "
    "Stop that process, or listen elsewhere; port 0 takes a free one."
)

OK, FAILED, USAGE = 0, 1, 2

_log = logging.getLogger("bnserver")


class StartError(RuntimeError):
    """The service can't start; the text says why, and what to do."""


def serve(configuration: Configuration) -> int:
    """Run the service until SIGTERM or SIGINT.

    Returns:
        The exit code: 0 after an orderly end, 1 if the service could not start or save, 2 if the configuration can't be
        used.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to read anew
    _permit_open_files()
    try:
        configuration.check()
        failpoints = Failpoints(os.environ)
        with logged(configuration.log_level, configuration.log_file, configuration.log_format):
            kernels()  # before it listens: a variable that names none is known at once
            asyncio.run(_serve(configuration, failpoints))
    except (ConfigurationError, FailpointError) as error:
        print(f"bnserver: {error}", file=sys.stderr)  # noqa: T201 - what a command says on its way out
        return USAGE
    except (CertificateError, LogError, StartError, StoreError, TokensError) as error:
        print(f"bnserver: {error}", file=sys.stderr)  # noqa: T201 - what a command says on its way out
        return FAILED
    return OK


async def _serve(configuration: Configuration, failpoints: Failpoints) -> None:
    stop = _stop_on_signals()
    files = _tls_files(configuration)
    certificates = Certificates(load(files)) if files is not None else None
    admission = Admission(read_tokens(configuration.tokens)) if configuration.tokens is not None else None
    reloading = Reloading(
        (files, certificates) if files is not None and certificates is not None else None,
        (configuration.tokens, admission) if configuration.tokens is not None and admission is not None else None,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloading.request)
    _log_access(configuration, certificates)
    store = Store(configuration.state_dir, failpoints) if configuration.state_dir is not None else None
    try:
        health_service = Health()
        await _set_health(health_service, HealthCheckResponse.NOT_SERVING)

        async def report_whether_saving(saving: bool) -> None:
            status = HealthCheckResponse.SERVING if saving else HealthCheckResponse.NOT_SERVING
            await health_service.set(SAVING_NAME, status)

        await report_whether_saving(store is not None)
        exchanges = Servicer(
            secrets.randbits(63),
            store,
            timeouts=LivenessTimeouts(configuration.lease, configuration.away),
            failpoints=failpoints,
            saving=report_whether_saving,
            keep=Keep(configuration.keep_jobs_days, configuration.keep_jobs, configuration.keep_checkpoints),
            quotas=configuration.quotas,
        )
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[admission] if admission is not None else None)
        rpc.add_StatisticsServiceServicer_to_server(exchanges, server)
        observing = ObservationServicer(exchanges.jobs)
        observation_rpc.add_ObservationServiceServicer_to_server(observing, server)
        health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
        if configuration.reflection:
            _reflect(server)
        port = _bind(server, configuration.listen, certificates)
        looking_on = _for_those_who_look_on(configuration, exchanges, admission, certificates, files)
        await server.start()
        watching = asyncio.create_task(reloading.run())
        try:
            await exchanges.open(port)
            await _set_health(health_service, HealthCheckResponse.SERVING)
            _announce(f"{configuration.listen.rpartition(':')[0]}:{port}", configuration.ready_file)
            await stop.wait()
            _log.info("stopping: telling every rank, saving every job")
            await _set_health(health_service, HealthCheckResponse.NOT_SERVING)
            observing.close()
            await exchanges.close()
        finally:
            watching.cancel()
            await server.stop(_GRACE_S)
            for each in looking_on:
                await asyncio.to_thread(each.close)
    finally:
        if store is not None:
            store.close()


def _permit_open_files() -> None:
    """As many as the system allows: the usual 1024 are fewer than strangers may hold beside the ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _stop_on_signals() -> asyncio.Event:
    """What is set when the service is to stop."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # Batch systems announce a job's end by one of them, to every process of a step. The ranks act on it.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    return stop


def _tls_files(configuration: Configuration) -> Files | None:
    if configuration.tls_cert is None or configuration.tls_key is None:
        return None
    return Files(configuration.tls_cert, configuration.tls_key, configuration.tls_client_ca)


def _log_access(configuration: Configuration, certificates: Certificates | None) -> None:
    if certificates is None:
        if configuration.tokens is not None and configuration.insecure:
            _log.warning("--insecure: tokens cross the network in plain text, and whoever listens there can use them")
        return
    _log.info("TLS with a certificate %s", certificates.loaded)
    left = certificates.loaded.days_left()
    if left < _SOON_DAYS:
        _log.warning("the certificate ends in %d days: bnlayer certs init --renew, then SIGHUP", left)


def _reflect(server: grpc.aio.Server) -> None:
    try:
        from grpc_reflection.v1alpha import reflection
    except ImportError as error:
        raise StartError("--reflection needs grpcio-reflection: pip install 'bnlayer[reflection]'.") from error
    names = (SERVICE_NAME, OBSERVATION_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


def _for_those_who_look_on(
    configuration: Configuration,
    exchanges: Servicer,
    admission: Admission | None,
    certificates: Certificates | None,
    files: Files | None,
) -> list[Endpoint | Dashboard]:
    """Open the ports of metrics and of the web page, where they are asked for."""
    opened: list[Endpoint | Dashboard] = []
    loop = asyncio.get_running_loop()
    address = ""
    try:
        if configuration.metrics is not None:
            address = configuration.metrics
            from bnserver.metrics import Source
            from bnserver.metrics_endpoint import Endpoint

            source = Source(exchanges, loop, admission, certificates, configuration.state_dir)
            opened.append(Endpoint(address, source, files))
        if configuration.dashboard is not None:
            address = configuration.dashboard
            from bnserver.page.endpoint import Dashboard

            opened.append(Dashboard(address, exchanges, loop, admission, certificates, files))
    except ImportError as error:
        raise StartError(
            f"{error.name} is not installed, which --metrics or --dashboard needs: pip install "
            "'bnlayer[metrics,dashboard]'."
        ) from error
    except OSError as error:
        raise StartError(_OCCUPIED.format(address, error)) from error
    return opened


def _bind(server: grpc.aio.Server, listen: str, certificates: Certificates | None) -> int:
    try:
        if certificates is not None:
            return server.add_secure_port(listen, certificates.credentials())
        return server.add_insecure_port(listen)
    except RuntimeError as error:
        raise StartError(_OCCUPIED.format(listen, error)) from error


async def _set_health(servicer: Health, status: int) -> None:
    # "" is the whole server, which the package would report as serving from the start.
    for service in ("", SERVICE_NAME):
        await servicer.set(service, status)


def _announce(address: str, ready_file: Path | None) -> None:
    if ready_file is not None:
        write_atomically(ready_file, address.encode())
    print(f"bnserver listening on {address}", flush=True)  # noqa: T201 - launchers read this line
