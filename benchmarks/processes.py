"""Starting the ranks of a benchmark, and reading what one of them found.

A benchmark that needs ranks is a module: `python -m MODULE RESULT ARGUMENTS…`, started once per rank. Rank 0 writes
its figures to RESULT as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parents[1]

# Open MPI needs to be told that root may start it, and that ranks may outnumber cores; MPICH reads none of these.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


class RanksFailed(RuntimeError):
    """Ranks ended with an error, or not at all."""


def under_mpi(ranks: int, module: str, *arguments: str, limit_s: float = 120) -> dict[str, float]:
    """Run a module as ranks under this environment's mpiexec."""
    mpiexec = str(Path(sys.prefix, "bin", "mpiexec"))
    command = [mpiexec, "-n", str(ranks), sys.executable, "-m", module]
    return _finished([command], arguments, [_OPEN_MPI], limit_s)


def over_service(ranks: int, module: str, *arguments: str, limit_s: float = 120) -> dict[str, float]:
    """Run a module as ranks of `bnlayer launch`, which starts a service for them."""
    launch = [sys.executable, "-m", "bnworker.cli", "launch", "-n", str(ranks), "--"]
    return _finished([[*launch, sys.executable, "-m", module]], arguments, [{}], limit_s)


def alone(module: str, *arguments: str, limit_s: float = 120) -> dict[str, float]:
    """Run a module as one process."""
    return _finished([[sys.executable, "-m", module]], arguments, [{}], limit_s)


def side_by_side(
    environments: Sequence[Mapping[str, str]],
    module: str,
    *arguments: str,
    python: str = sys.executable,
    limit_s: float = 120,
) -> dict[str, float]:
    """Run a module as processes that find each other by themselves, one per environment."""
    return _finished([[python, "-m", module]] * len(environments), arguments, environments, limit_s)


def free_ports(number: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _finished(
    commands: Sequence[Sequence[str]],
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    limit_s: float,
) -> dict[str, float]:
    """What rank 0 wrote; every process is gone afterwards.

    Raises:
        RanksFailed: one of them failed, or took too long.
    """
    # The kernels that were asked for are the ranks' as well; no world is.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("BNLAYER_") or k == "BNLAYER_KERNELS"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        started = []
        for number, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            with Path(folder, f"{number}.log").open("w", encoding="utf-8") as log:
                started.append(
                    subprocess.Popen(
                        [*command, str(result), *arguments],
                        cwd=HERE,
                        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        try:
            codes = [process.wait(limit_s) for process in started]
        except subprocess.TimeoutExpired as error:
            raise RanksFailed(f"not done within {limit_s:g} s: {_tails(folder)}") from error
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if any(codes) or not result.exists():
            raise RanksFailed(f"exit codes {codes}: {_tails(folder)}")
        figures: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
        return figures


def _tails(folder: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8")[-2000:] for path in sorted(Path(folder).glob("*.log")))


def write(result: str, figures: Mapping[str, float]) -> None:
    """What rank 0 found."""
    Path(result).write_text(json.dumps(figures), encoding="utf-8")
