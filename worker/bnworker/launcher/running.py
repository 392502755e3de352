"""A job from start to end.

    address answers → guardian → service → ranks …… all ended → service → guardian's sweep → last output → exit code

`supervision` decides; this module gives it the events (ends of `processes`, signals, other launchers' messages), and
carries its decisions out. Where the job has several hosts (`nodes`), node 0's launcher decides for all of them; the
others report to it what ends here, and act for themselves only once it is gone. How a process is started, signalled
and waited for is in `processes`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bnworker.failure_marker import FOLDER, is_marked, left_open
from bnworker.launcher import starting
from bnworker.launcher.command import foreign_python
from bnworker.launcher.guardian import sweep
from bnworker.launcher.nodes import Head, Member, parsed
from bnworker.launcher.output import Output, Outputs
from bnworker.launcher.processes import Processes
from bnworker.launcher.reach import reach
from bnworker.launcher.reactor import Reactor, signals
from bnworker.launcher.remote import attach
from bnworker.launcher.starting import Job, LaunchError
from bnworker.launcher.supervision import (
    LAUNCHER,
    MPIEXEC,
    SERVICE,
    Alarm,
    Elastic,
    Ended,
    Event,
    Interrupted,
    Phase,
    Restart,
    SendSignal,
    Supervision,
    TimeUp,
    after_a_loss,
)

# The guardian gives up after 10 s.
_SWEEP_S = 12.0

# Where a launcher is gone, its ranks are, too: the others have this long, twice, instead of the grace.
_ABANDONED_S = 1.5

# Signals that are passed to the ranks, and don't end the job.
_PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)


def launch(job: Job, output: Output | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Run a job to its end; leaves nothing running.

    Must be called in the main thread (it receives signals), in a process that may wait for it.

    Args:
        job: what to run.
        output: how it is shown and what of it is kept; None: shown, and nothing is kept.
        environ: the variables that its processes inherit.

    Returns:
        The exit code: see `supervision`.

    Raises:
        LaunchError: it could not be started.
    """
    if job.several is not None:
        parsed(job.several.rendezvous, insecure=job.several.insecure)
    if job.several is None or job.several.node == 0:  # the others tell node 0 what is wrong
        starting.check(job, environ)
    if job.address is not None:
        reach(job.address, job.wait_s)
    _secure_standard_streams()
    run = _Run(job, output or Output(), environ)
    guardian = starting.start_guardian(run.folder, environ)
    try:
        with signals(run.reactor, run.signalled):
            if job.several is not None and job.several.attached:
                attach(run.reactor, run.signalled)
            try:
                run.start(environ)
                run.reactor.pump(lambda: run.done)
            finally:
                run.finish(guardian)
    finally:
        guardian.kill()  # it ended, or would sweep for ever
        if guardian.wait() != 0:  # it was killed: its work is done here
            sweep(os.fsencode(f"{FOLDER}={run.folder}"))
            shutil.rmtree(run.folder, ignore_errors=True)
    return run.exit_code()


def _secure_standard_streams() -> None:
    """Flush the standard streams; where one is closed, open /dev/null in its place, so that no pipe gets its number."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


class _Run:
    def __init__(self, job: Job, output: Output, environ: Mapping[str, str]) -> None:
        self._advice = foreign_python(job.command, environ)
        self.reactor = Reactor()
        several = job.several
        self._head = (
            Head(self.reactor, job, self._ended_elsewhere, self.signalled) if several and not several.node else None
        )
        self._member = (
            Member(self.reactor, job, self._send_signal, self._restart, self._abandoned)
            if several and several.node
            else None
        )
        self._host = os.uname().nodename if several else ""
        self._announced: set[str] = set()
        self.supervision = Supervision(frozenset(), grace_s=job.grace_s, stop_s=job.stop_s, resumable=job.resumable)
        if job.elastic is not None and self._member is None:  # node 0 decides
            fewest = job.elastic.minimum if job.embeds_service else 1
            self.supervision = replace(self.supervision, elastic=Elastic(fewest, job.max_restarts, job.final))
        self._job = job
        self._outputs = Outputs(self.reactor, job, output, environ, self._unread)
        self.folder = Path(tempfile.mkdtemp(prefix="bnlayer-launch-"))
        self._processes = Processes(
            self.reactor,
            job,
            self.folder,
            self._outputs,
            output.log_dir,
            started=self._started,
            ended=self._ended,
            service_ended=self._service_ended,
        )
        self._finishing = False
        self._interrupted = False

    # ---- start ----

    def start(self, environ: Mapping[str, str]) -> None:
        """Start everything, unless a signal comes first."""
        job = self._job
        agreed = self._agreed(environ) if self._member is None else self._agreed_by_member(self._member, environ)
        if agreed is None:
            return
        name, address = agreed
        self._processes.start(starting.environment(replace(job, name=name), self.folder, address, environ))

    def _restart(self, rank: int, number: int) -> None:
        """Start a rank of an elastic job again."""
        if rank not in self._job.local_ranks:
            assert self._head is not None
            self._head.restart(rank, number)
        elif not self._finishing:
            self._processes.restart(rank, number)

    def _agreed(self, environ: Mapping[str, str]) -> tuple[str, str | None] | None:
        """The job's name and the service's address, once all launchers are there; None if a signal came first."""
        job, head = self._job, self._head
        if head is not None:
            head.listen()
        name, address = job.name or starting.fresh_name(), job.address
        if job.embeds_service:
            address = self._processes.start_service(
                starting.environment(job, self.folder, None, environ),
                lambda: self.supervision.phase is not Phase.RUNNING,
            )
        if self.supervision.phase is not Phase.RUNNING:
            return None
        if head is not None:
            assert job.several is not None
            assert address is not None
            wait_s = job.several.wait_s
            self.reactor.pump(lambda: head.complete or self.supervision.phase is not Phase.RUNNING, wait_s)
            if self.supervision.phase is not Phase.RUNNING:
                return None
            refusal = head.refusal
            if refusal is None and not head.complete:
                late = ", ".join(map(str, head.missing()))
                refusal = LaunchError(
                    f"node {late} did not come to {job.several.rendezvous} within {wait_s:g} s (--wait). Start the "
                    "command with that --node-rank on its host, which must reach this port and the one after it.",
                    1,
                )
            if refusal is not None:
                head.refuse(str(refusal), refusal.code)
                raise refusal
            self.supervision = replace(self.supervision, running=head.start(name, address))
        return name, address

    def _agreed_by_member(self, member: Member, environ: Mapping[str, str]) -> tuple[str, str | None] | None:
        """The same, as node 0 says."""

        def stop() -> bool:
            return self.supervision.phase is not Phase.RUNNING

        member.connect(stop)
        try:
            starting.check(self._job, environ)
        except LaunchError as error:
            if member.linked:
                member.unable(error)
            raise
        self.reactor.pump(
            lambda: bool(member.started or member.refusal or member.head_is_lost or member.exit) or stop()
        )
        if member.refusal is not None:
            raise member.refusal
        if member.head_is_lost and member.exit is None and not stop():
            raise LaunchError("the launcher of node 0 ended before the job began.", 1)
        return None if stop() or member.exit else member.started

    # ---- what happens ----

    def signalled(self, number: int) -> None:
        """The launcher got a signal."""
        if self._finishing:
            self._interrupted = True
        elif number in _PASSED_ON:
            self._send_signal(number)
        else:
            self._handle(Interrupted(number))

    def _unread(self) -> None:
        """The reader of the output has closed it: act as on a SIGPIPE."""
        if not self._finishing:
            self._handle(Interrupted(signal.SIGPIPE))

    def _started(self, who: int) -> None:
        self.supervision = replace(self.supervision, running=self.supervision.running | {who})

    def _ended(self, who: int, status: int) -> None:
        secondary, open_ = (is_marked(self.folder, who), left_open(self.folder, who)) if who >= 0 else (False, "")
        self._handle(Ended(who, status, secondary, open_ if status == 0 else "", self._host if who >= 0 else ""))

    def _ended_elsewhere(self, end: Ended) -> None:
        """Node 0: a rank on another host has ended, or its launcher is gone."""
        if not self._finishing:
            if end.who <= LAUNCHER and not self.supervision.can_lose(end):
                self._shorten_grace()
            self._handle(end)
        elif end.who <= LAUNCHER:
            self._shorten_grace()

    def _abandoned(self) -> None:
        """Another node: the launcher of node 0 is gone."""
        self._shorten_grace()
        if self.supervision.phase in (Phase.RUNNING, Phase.GRACE):
            self._handle(Ended(LAUNCHER, -signal.SIGKILL))
            self.reactor.ring(_ABANDONED_S, lambda: self._handle(TimeUp()))
        else:
            self._send_signal(signal.SIGKILL)

    def _shorten_grace(self) -> None:
        grace_s = min(self.supervision.grace_s, _ABANDONED_S)
        self.supervision = replace(self.supervision, grace_s=grace_s, stop_s=None)

    def _service_ended(self, status: int) -> None:
        if not self._finishing:
            self._handle(Ended(SERVICE, status or 1))  # even with code 0: no rank can go on without it

    def _handle(self, event: Event) -> None:
        before = self.supervision
        self.supervision, effects = before.handle(event)
        if self._member is not None and self._member.linked:
            effects = []  # node 0 decides
            if isinstance(event, Ended):
                self._member.ended(event)
            elif isinstance(event, Interrupted):
                self._member.interrupted(event.signal)
        if isinstance(event, Ended):
            self._announce(event, before)
        self._name_unreported(before)
        for effect in effects:
            match effect:
                case SendSignal(number):
                    self._send_signal(number)
                case Alarm(seconds):
                    self.reactor.ring(seconds, lambda: self._handle(TimeUp()))
                case Restart(rank, number):
                    self._restart(rank, number)

    def _announce(self, end: Ended, before: Supervision) -> None:
        """Say how a process failed, and what becomes of the job."""
        counted = len(self.supervision.ended) > len(before.ended)
        if counted and end.failed and end.status not in self._job.explained:
            self._announced.add(str(end))
            self._outputs.announce(str(end))
            if end.status == 1 and self._advice is not None:  # an uncaught exception
                self._outputs.announce(self._advice)
                self._advice = None
        if text := after_a_loss(before, self.supervision, end):
            self._outputs.announce(text)

    def _name_unreported(self, before: Supervision) -> None:
        """Report the ranks that mpiexec ended, unless another rank's failure explains it."""
        ranks = sorted(self.supervision.unreported - before.unreported)
        if ranks and not any(end.failed and end.who != MPIEXEC for end in self.supervision.ended):
            named = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
            self._outputs.announce(f"{named} did not report an end before mpiexec ended: the job has failed")

    # ---- what is done ----

    def _send_signal(self, number: int) -> None:
        """Send a signal to the ranks, here and on the other hosts."""
        if self._head is not None:
            self._head.signal(number)
        asked = number not in (signal.SIGKILL, *_PASSED_ON)
        ranks = self._processes.signal(number, self.supervision.seconds_to_kill if asked else None)
        if ranks and number not in _PASSED_ON:
            message = f"{signal.Signals(number).name} sent to ranks {', '.join(map(str, ranks))}"
            then = f"; SIGKILL follows in {self.supervision.seconds_to_kill:g} s, or at once on Ctrl-C"
            self._outputs.announce(message if number == signal.SIGKILL else message + then)

    # ---- the end ----

    @property
    def done(self) -> bool:
        """Whether nothing is left to wait for."""
        member = self._member
        return self.supervision.done if member is None or not member.linked else member.exit is not None

    def exit_code(self) -> int:
        """The launcher's: the same on every host."""
        if self._member is not None and self._member.exit is not None:
            return self._member.exit[0]
        return self.supervision.exit_code()

    def finish(self, guardian: subprocess.Popen[bytes]) -> None:
        """End the service, sweep up what is left, write the last output."""
        self._finishing = True
        if self._head is not None:
            cause = self.supervision.cause
            cause_text = "" if cause is None or cause.status in self._job.explained else str(cause)
            self._head.finish(self.supervision.exit_code(), cause_text)
        elif self._member is not None:
            if self._member.exit is not None and self._member.exit[1] not in self._announced | {""}:
                self._outputs.announce(self._member.exit[1])
            self._member.close()
        self._processes.stop_service()
        swept = [False]
        self._processes.on_end(guardian, lambda _: swept.__setitem__(0, True))
        assert guardian.stdin is not None
        with suppress(BrokenPipeError):  # it was killed
            guardian.stdin.write(b".")
            guardian.stdin.close()
        self.reactor.pump(lambda: swept[0], _SWEEP_S)
        self._outputs.close()
        self.reactor.pump(lambda: self._interrupted or self._outputs.written)
