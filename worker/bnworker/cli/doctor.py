"""`bnlayer doctor`: what is installed, and what it can reach."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

_PACKAGES = (
    "bnlayer",
    "numpy",
    "ml_dtypes",
    "grpcio",
    "protobuf",
    "safetensors",
    "mpi4py",
    "scikit-learn",
    "cryptography",
)
_REACH_S = 5.0  # a service on the other side of the world answers within a second


def doctor(
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", envvar="BNLAYER_ADDRESS", help="A service to try to reach."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object, for programs.")] = False,
) -> None:
    """Say what is installed, which MPI and kernels are in use, and whether a service can be reached.

    `bnlayer doctor --address 127.0.0.1:7431`

    The service is reached as a rank would reach it, with what BNLAYER_TLS_CA, BNLAYER_TLS_CERT, BNLAYER_TLS_KEY and
    BNLAYER_TOKEN_FILE name; whether the token is good is only known when a rank joins.

    Exit code 1 if the address was given and nothing answers there. `--json` prints the same as one object: names and
    texts, and for the service `address`, `serving` and `text`, or null.
    """
    report = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.platform()}, {len(os.sched_getaffinity(0))} usable cores",
        **{package: _installed(package) for package in _PACKAGES},
        "kernels": _kernels(),
        "MPI library": _mpi_library(),
        "mpiexec": _mpiexec(),
        "ranks announced": _ranks(),
    }
    serving, text = _reach(address) if address else (None, "no address given (--address)")
    if as_json:
        service = None if serving is None else {"address": address, "serving": serving, "text": text}
        typer.echo(json.dumps({**report, "service": service}, indent=2))
    else:
        _print_table({**report, "service": text})
    raise typer.Exit(1 if serving is False else 0)


def _print_table(rows: dict[str, str]) -> None:
    from rich.table import Table

    from bnworker.cli.console import console

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    console().print(table)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _kernels() -> str:
    from bnlayer.kernels import kernels

    return str(kernels().name)


def _mpi_library() -> str:
    """Asked in a process of its own: importing mpi4py starts MPI, which may abort.

    `-P`: files of the current folder, such as `types.py`, are no modules.
    """
    import subprocess

    asked = subprocess.run(
        [sys.executable, "-P", "-m", "mpi4py", "--mpi-lib-version"],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if asked.returncode != 0:
        return "none that mpi4py can use; pip install 'bnlayer[mpich]' brings one"
    return " ".join(asked.stdout.partition("\n")[0].split())


def _mpiexec() -> str:
    from bnworker.launcher import mpi

    mpiexec = mpi.find(os.environ)
    return f"{mpiexec} ({mpi.vendor(mpi.version(mpiexec))})" if mpiexec else "none beside this Python, nor on PATH"


def _ranks() -> str:
    from bnlayer.environment import announced

    try:
        announcements = announced(os.environ)
    except ValueError as error:
        return str(error)
    return "; ".join(f"{a.source}: rank {a.rank} of {a.world_size}" for a in announcements) or "none"


def _reach(address: str) -> tuple[bool, str]:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from bnproto.connection import Connector
    from bnproto.credentials import CredentialsError, credentials

    try:
        connector = Connector(address, credentials(os.environ))
    except CredentialsError as error:
        return False, str(error)
    with connector.channel() as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # its types lack the methods
            answer = check(health_pb2.HealthCheckRequest(), timeout=_REACH_S)
        except grpc.RpcError as error:
            why = connector.fault() if error.code() is grpc.StatusCode.UNAVAILABLE else None
            return False, why or f"{address} does not answer: {error.code().name}: {error.details()}"
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return status == "SERVING", f"{address} answers: {status}"
