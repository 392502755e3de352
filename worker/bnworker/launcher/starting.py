"""The processes of a job: what their environment says, and how they are started.

Laws:
1. Exec or spawn only: a fork of a process with threads may deadlock.
2. Every process leads a session of its own: a signal from the terminal reaches the launcher alone, which
   passes it on; and reads nothing: its standard input is empty.
3. Everything carries `BNLAYER_LAUNCH_DIR`; the guardian, which must outlive the rest, does not.
"""

from __future__ import annotations

import math
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bnlayer.environment import announced
from bnproto.credentials import NONE, VARIABLES, CredentialsError, credentials
from bnworker.failure_marker import FOLDER
from bnworker.launcher import mpi
from bnworker.launcher.command import NOT_EXECUTABLE, refusal
from bnworker.launcher.supervision import GRACE_S
from bnworker.limits import RESTARTED, VARIABLE, Limits
from bnworker.own_service import daemon_environment, refuse_credentials

_HERE = Path(__file__).parent
_ELASTIC_LEASE_S = 4  # of the service of an elastic job, whose ranks shall go on within 5 s of a host's loss


class LaunchError(Exception):
    """The job could not be started.

    Attributes:
        code: what the launcher exits with.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Several:
    """One of several hosts that run a job together.

    Attributes:
        nodes: how many there are.
        node: which this one is, from 0; node 0's launcher keeps the service, and supervises the job.
        rendezvous: HOST:PORT of the service, on node 0; the launchers meet at the port after it.
        first_rank: the first of the ranks here.
        world_size: the number of ranks on all of them.
        insecure: whether plain text may leave this machine.
        wait_s: seconds until all must have come.
        attached: whether signals come through the standard input, whose end ends the job: see `remote`.
    """

    nodes: int
    node: int
    rendezvous: str
    first_rank: int
    world_size: int
    insecure: bool = False
    wait_s: float = 300.0
    attached: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.node < self.nodes:
            raise LaunchError(
                f"--node-rank: expected 0 to {self.nodes - 1} with --nnodes {self.nodes}, received {self.node}."
            )


@dataclass(frozen=True, slots=True)
class Job:
    """What to run.

    Attributes:
        command: the program of every rank, and its arguments.
        ranks: how many, on this host.
        transport: "service", "mpi" or "alone".
        address: of a service that runs already, "HOST:PORT"; None: one is started for this job.
        name: the job's; None: a fresh one.
        foreground: rank 0 writes to the launcher's own output, without a prefix (not under mpiexec, nor where its
            output is logged).
        wait_s: seconds to wait for the service at `address` to listen.
        grace_s: seconds that the other ranks have after a failure, and once more between SIGTERM and SIGKILL.
        stop_s: seconds that the ranks have after a signal from outside, before SIGKILL; None: `grace_s`.
        program: the command that the user typed, `bnlayer PROGRAM`; it stands in front of the launcher's own lines.
        explained: exit codes whose reason the ranks print themselves: the launcher prints no line for them.
        resumable: the exit code of ranks that a signal stopped, and that can be resumed; None: they have none.
        several: where this host stands among several; None: it is the only one.
        elastic: how many ranks the job may have; None: as many as are started.
        max_restarts: how many of an elastic job's ranks are started again after they were lost.
        final: exit codes of ranks that starting them again would not mend.
    """

    command: tuple[str, ...]
    ranks: int
    transport: str = "service"
    address: str | None = None
    name: str | None = None
    foreground: bool = False
    wait_s: float = 0.0
    grace_s: float = GRACE_S
    stop_s: float | None = None
    program: str = "launch"
    explained: frozenset[int] = frozenset()
    resumable: int | None = None
    several: Several | None = None
    elastic: Limits | None = None
    max_restarts: int = 3
    final: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.command:
            raise LaunchError("expected a command after --, received nothing; e.g. bnlayer launch -n 2 -- python x.py")
        if self.ranks < 1:
            raise LaunchError(f"expected at least 1 rank, received {self.ranks}.")
        if self.transport not in ("service", "mpi", "alone"):
            raise LaunchError(f"expected transport service, mpi or alone, received {self.transport!r}.")
        if self.address is not None and self.transport != "service":
            raise LaunchError(f"an address is for transport service, received transport {self.transport}.")
        if self.several is not None and self.transport != "service":
            raise LaunchError(
                f"several hosts are for transport service, received transport {self.transport}: mpiexec and srun start "
                "MPI ranks on several hosts themselves."
            )
        if self.elastic is not None:
            self._check_elastic(self.elastic)
        for name, seconds in (("wait", self.wait_s), ("grace", self.grace_s)):
            if not 0 <= seconds < math.inf:
                raise LaunchError(f"--{name}: expected a number of seconds, 0 or more, received {seconds:g}.")

    def _check_elastic(self, limits: Limits) -> None:
        if self.transport != "service":
            raise LaunchError(
                f"--elastic needs the statistics service, received transport {self.transport}: there the loss of a "
                "rank ends the job. Leave out --transport; or start the ranks by Open MPI's `mpirun --with-ft ulfm`."
            )
        if self.max_restarts < 0:
            raise LaunchError(f"--max-restarts: expected 0 or more, received {self.max_restarts}.")
        fewest = limits.minimum if self.address is None else 1  # at a service that runs already others may join it
        if not fewest <= self.world_size <= limits.maximum:
            raise LaunchError(
                f"--elastic {limits}: expected {fewest} to {limits.maximum} ranks to start with, received "
                f"{self.world_size}."
            )

    @property
    def embeds_service(self) -> bool:
        """Whether a service must be started here."""
        return self.transport == "service" and self.address is None and not (self.several and self.several.node)

    @property
    def local_ranks(self) -> range:
        """The ranks on this host."""
        first = self.several.first_rank if self.several is not None else 0
        return range(first, first + self.ranks)

    @property
    def world_size(self) -> int:
        """The number of ranks, on all hosts."""
        return self.several.world_size if self.several is not None else self.ranks


def environment(job: Job, folder: Path, address: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of a job's processes; `rank_environment` adds the rank.

    Ranks that an outer launcher announced are taken out: these processes have others. So are credentials where the
    service is this job's own: it speaks plain text, and would be shown what is another service's.
    """
    outer = {each.variable for each in announced(environ)} | {"PMIX_RANK", "BNLAYER_ADDRESS", VARIABLE, RESTARTED}
    if job.embeds_service:
        outer |= set(VARIABLES)
    inner = {name: value for name, value in environ.items() if name not in outer}
    inner |= {
        FOLDER: str(folder),
        "BNLAYER_TRANSPORT": job.transport,
        "BNLAYER_WORLD_SIZE": str(job.world_size),
        "BNLAYER_JOB": job.name or fresh_name(),
    }
    if address is not None:
        inner["BNLAYER_ADDRESS"] = address
    if job.elastic is not None:
        inner[VARIABLE] = str(job.elastic)
    return inner


def fresh_name() -> str:
    """A name that no job has had."""
    return f"job-{secrets.token_hex(6)}"


def check(job: Job, environ: Mapping[str, str]) -> None:
    """Make sure that a job can be started, before anything is.

    Raises:
        LaunchError: the command was not found (127), or may not be executed (126): a shell's codes; or this process
            is an MPI rank itself; or credentials for the service at `address` can't be used there, or would be
            expected of this job's own service on several hosts.
    """
    shown = credentials(environ) if job.address is not None or job.several is not None else NONE
    try:
        if job.address is not None:
            shown.check(job.address)
        elif job.several is not None and job.embeds_service:
            refuse_credentials(shown)
    except CredentialsError as error:
        raise LaunchError(str(error)) from None
    outer = next((each for each in announced(environ) if each.mpi), None)
    if job.transport == "mpi" and outer is not None:
        raise LaunchError(
            f"{outer.source} started this process as rank {outer.rank}; mpiexec cannot run inside mpiexec. "
            "Run the command itself here, without the launcher."
        )
    refused = refusal(job.command[0], environ)
    if refused is not None:
        raise LaunchError(*refused)


def start_guardian(folder: Path, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the guardian; it acts when its standard input ends."""
    clean = {name: value for name, value in environ.items() if name != FOLDER}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_HERE / "guardian.py"), f"{FOLDER}={folder}", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=clean,
        start_new_session=True,
        cwd="/",
    )


def start_service(job: Job, environ: Mapping[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    """Start a statistics service for this job alone: a free loopback port or the rendezvous, nothing kept.

    What the environment says of another daemon, such as its certificates, is not for this one.
    """
    return _start(service_command(job, log), daemon_environment(environ), subprocess.PIPE)


def service_command(job: Job, log: Path | None) -> list[str]:
    """Its command: it prints warnings and errors only; the rest goes to its log, if there is one."""
    listen = job.several.rendezvous if job.several is not None else "127.0.0.1:0"
    command = [sys.executable, "-P", "-m", "bnserver", "--listen", listen, "--log-level", "warning"]
    command += ["--insecure"] if job.several is not None and job.several.insecure else []
    command += ["--lease", str(_ELASTIC_LEASE_S)] if job.elastic is not None else []
    command += ["--log-file", str(log)] if log is not None else []
    return command


def start_rank(
    job: Job, rank: int, environ: Mapping[str, str], *, foreground: bool, restarts: int = 0
) -> subprocess.Popen[bytes]:
    """Start one rank; in the foreground it has the launcher's own output.

    Args:
        job: whose.
        rank: which.
        environ: of the job's processes.
        foreground: whether it does.
        restarts: of the job's ranks so far, this one included.
    """
    output = None if foreground else subprocess.PIPE
    inner = {**environ, "BNLAYER_RANK": str(rank)} | ({RESTARTED: str(restarts)} if restarts else {})
    return _start(list(job.command), inner, output)


def start_mpiexec(job: Job, folder: Path, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start all ranks through mpiexec, each behind `mpirank.py`; `folder` gets their pipes.

    Raises:
        LaunchError: there is no mpiexec.
    """
    mpiexec = mpi.find(environ)
    if mpiexec is None:
        raise LaunchError(
            "transport mpi needs mpiexec: there is none beside this Python, nor on PATH. "
            "Install one, e.g. pip install 'bnlayer[mpich]'."
        )
    for rank in range(job.ranks):
        for name in ("out", "err", "end"):
            os.mkfifo(folder / f"{rank}.{name}", 0o600)
    needed = mpi.environment(mpi.vendor(mpi.version(mpiexec)), job.ranks, folder, environ)
    shim = [sys.executable, "-I", "-S", str(_HERE / "mpirank.py"), str(folder), str(job.ranks)]
    command = [mpiexec, "-n", str(job.ranks), *shim, *(f"={word}" for word in job.command)]
    return _start(command, {**environ, **needed}, subprocess.PIPE)


def _start(command: list[str], environ: Mapping[str, str], output: int | None) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, start_new_session=True
        )
    except OSError as error:
        raise LaunchError(f"{command[0]}: {error.strerror}", NOT_EXECUTABLE) from error


def detach(pipe: IO[bytes]) -> int:
    """A descriptor of a pipe's own, so that the reactor alone closes it."""
    descriptor = os.dup(pipe.fileno())
    pipe.close()
    return descriptor
