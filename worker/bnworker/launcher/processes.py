"""The processes of a job on this host: they are started, signalled, and waited for.

It knows processes, their pipes and their process groups. What the end of one means for the job, and which signal comes
next, it does not: `supervision` decides that, and `running` passes it on. How a command is put together is in
`starting`.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from bnworker.failure_marker import forget, stopping
from bnworker.launcher import starting
from bnworker.launcher.output import Outputs
from bnworker.launcher.reactor import Reactor
from bnworker.launcher.starting import Job, LaunchError
from bnworker.launcher.supervision import MPIEXEC

# Python, NumPy and gRPC on a cold disk beside busy ranks; a start takes half a second otherwise.
_SERVICE_START_S = 60.0
# The service drains within 5 s.
_SERVICE_STOP_S = 6.0

_LISTENING = b"bnserver listening on "


class Processes:
    """Ranks, mpiexec and the service of a job.

    Args:
        reactor: waits for them.
        job: whose they are.
        folder: of the job's pipes and failure markers.
        outputs: take what they write.
        log_dir: of the service's log; None: there is none.
        started: called with each rank, or `MPIEXEC`, that runs now.
        ended: called with each of them and its status, as in `subprocess`.
        service_ended: called with the status of the service.
    """

    def __init__(
        self,
        reactor: Reactor,
        job: Job,
        folder: Path,
        outputs: Outputs,
        log_dir: Path | None,
        *,
        started: Callable[[int], None],
        ended: Callable[[int, int], None],
        service_ended: Callable[[int], None],
    ) -> None:
        self._reactor = reactor
        self._job = job
        self._folder = folder
        self._outputs = outputs
        self._log_dir = log_dir
        self._started = started
        self._ended = ended
        self._service_ended = service_ended
        self._environ: Mapping[str, str] = {}
        self._reports: dict[int, int] = {}  # rank: the pipe through which it reports its end
        self._groups: dict[int, int] = {}  # who: the process group that gets its signals
        self._service: subprocess.Popen[bytes] | None = None

    # ---- start ----

    def start(self, environ: Mapping[str, str]) -> None:
        """Start the ranks of this host.

        Args:
            environ: of the job's processes: `starting.environment`.

        Raises:
            LaunchError: they can't be started.
        """
        self._environ = environ
        if self._job.transport == "mpi":
            self._start_mpi()
            return
        for rank in self._job.local_ranks:
            self._start_rank(rank)

    def restart(self, rank: int, number: int) -> None:
        """Start a rank of this host again, in an elastic job.

        Args:
            rank: which.
            number: of this restart among those of the job, from 1.
        """
        forget(self._folder, rank)
        self._start_rank(rank, number)

    def start_service(self, environ: Mapping[str, str], stopped: Callable[[], bool]) -> str:
        """Start the job's own service; returns its address, or "" if `stopped` holds first.

        Raises:
            LaunchError: it did not start.
        """
        log = self._log_dir and self._log_dir / "service.log"
        self._service = process = starting.start_service(self._job, environ, log)
        assert process.stdout is not None
        assert process.stderr is not None
        self._outputs.other(starting.detach(process.stderr), "service")
        message = bytearray()
        output = starting.detach(process.stdout)

        def ready() -> None:
            chunk = os.read(output, 4096)
            message.extend(chunk or b"\n")  # its end ends the waiting

        self._reactor.watch(output, ready)
        self._reactor.pump(lambda: b"\n" in message or stopped(), _SERVICE_START_S)
        self._reactor.forget(output)
        self._outputs.other(output, "service")
        line = bytes(message).partition(b"\n")[0]
        if not stopped() and not line.startswith(_LISTENING):
            raise LaunchError("the statistics service for this job did not start; what it said stands above.", 1)
        self.on_end(process, self._service_has_ended)
        return line.removeprefix(_LISTENING).decode()

    def _start_rank(self, rank: int, restarts: int = 0) -> None:
        foreground = self._job.foreground and rank == 0 and self._log_dir is None
        process = starting.start_rank(self._job, rank, self._environ, foreground=foreground, restarts=restarts)
        self._supervise(rank, process)
        for pipe, kind in ((process.stdout, "out"), (process.stderr, "err")):
            if pipe is not None:
                self._outputs.rank(starting.detach(pipe), rank, kind)

    def _start_mpi(self) -> None:
        process = starting.start_mpiexec(self._job, self._folder, self._environ)
        self._supervise(MPIEXEC, process)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            self._outputs.other(starting.detach(pipe), "mpiexec")
        for rank in range(self._job.ranks):
            self._started(rank)
            for kind in ("out", "err"):
                self._outputs.rank(self._opened(f"{rank}.{kind}"), rank, kind)
            self._reports[rank] = report = self._opened(f"{rank}.end")
            self._reactor.watch(report, partial(self._read_report, rank))

    def _opened(self, pipe: str) -> int:
        return os.open(self._folder / pipe, os.O_RDONLY | os.O_NONBLOCK)

    # ---- ends ----

    def on_end(self, process: subprocess.Popen[bytes], ended: Callable[[int], None]) -> None:
        """Call `ended` with the status of a process, once it has one."""
        handle = os.pidfd_open(process.pid)

        def ready() -> None:
            self._reactor.forget(handle)
            os.close(handle)
            ended(process.wait())

        self._reactor.watch(handle, ready)

    def _supervise(self, who: int, process: subprocess.Popen[bytes]) -> None:
        self._groups[who] = process.pid
        self._started(who)
        self.on_end(process, partial(self._has_ended, who))

    def _read_report(self, rank: int) -> None:
        """A rank under mpiexec says its process group, and then its status."""
        report = self._reports[rank]
        try:
            message = os.read(report, 4096)
        except BlockingIOError:  # nothing yet
            return
        if not message:
            self._reactor.forget(report)
            os.close(report)
            del self._reports[rank]
        for line in message.split():
            if rank not in self._groups:
                self._groups[rank] = int(line)
            else:
                self._has_ended(rank, int(line))

    def _has_ended(self, who: int, status: int) -> None:
        if who == MPIEXEC:  # it ended after its ranks, whichever event came first
            for rank in tuple(self._reports):
                self._read_report(rank)
        self._groups.pop(who, None)
        self._ended(who, status)

    def _service_has_ended(self, status: int) -> None:
        self._service = None
        self._service_ended(status)

    # ---- signals ----

    def signal(self, number: int, seconds: float | None = None) -> list[int]:
        """Send a signal to the ranks; mpiexec, which would end them at once, gets only SIGKILL.

        Args:
            number: the signal's.
            seconds: that they have to end; None: it does not ask them to end, or ends them.

        Returns:
            The ranks that got it.
        """
        ranks = {who for who in self._groups if who >= 0}
        if seconds is not None:
            stopping(self._folder, seconds, ranks)
        for who in self._groups if number == signal.SIGKILL or not ranks else ranks:
            with suppress(ProcessLookupError):
                os.killpg(self._groups[who], number)
        return sorted(ranks)

    def stop_service(self) -> None:
        """End the service, and wait for it."""
        if self._service is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._service.pid, signal.SIGTERM)
            self._reactor.pump(lambda: self._service is None, _SERVICE_STOP_S)
