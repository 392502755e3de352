"""Starting ranks under the `mpiexec` of this environment, and leaving none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Open MPI needs to be told that root may start it, and that ranks may outnumber cores; MPICH reads none of these.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        code: mpiexec's exit code.
        out, err: what all ranks wrote.
    """

    code: int
    out: str
    err: str


class Job:
    """`mpiexec -n N python …` in a process group of its own, which does not outlive the `with` block.

    Args:
        world_size: N.
        arguments: of the interpreter: a script and its arguments.
        environ: variables beside this process's.
        options: of mpiexec.
    """

    def __init__(
        self,
        world_size: int,
        arguments: Sequence[str | Path],
        environ: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        mpiexec = Path(sys.prefix, "bin", "mpiexec")
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        self._temporary = tempfile.TemporaryDirectory(prefix="ranks-")
        session = {"PRTE_MCA_prte_local_tmpdir_base": self._temporary.name}  # Open MPI's, which it leaves when killed
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")}
        self._process = subprocess.Popen(
            [mpiexec, *options, "-n", str(world_size), sys.executable, *arguments],
            env={**inherited, **_OPEN_MPI, **session, "PYTHONPATH": path, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._temporary.cleanup()

    def wait(self, limit_s: float) -> Ended:
        """Wait for the job's end.

        Raises:
            subprocess.TimeoutExpired: it has not ended within the limit.
        """
        out, err = self._process.communicate(timeout=limit_s)
        return Ended(self._process.returncode, out, err)


def run(
    world_size: int,
    *arguments: str | Path,
    limit_s: float = 200,
    environ: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Ended:
    """Run a script on ranks under mpiexec, and wait for its end."""
    with Job(world_size, arguments, environ, options) as job:
        return job.wait(limit_s)
