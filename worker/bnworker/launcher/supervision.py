"""What a launcher does when ranks end, time passes or a signal comes: decisions alone, no process, no clock.

Laws:
1. A failed rank does not end the job at once: the others are just getting the error, and may still print it.
2. After the grace they get SIGTERM, after another one SIGKILL; a second signal from outside shortens the wait.
3. The exit code is that of the first cause: the first rank that failed on its own, or the signal from outside.
   A rank killed by a signal outranks ranks that exited; a rank that failed because of another's failure (a
   `CollectiveError`) comes last; ranks that the launcher itself ended never count.
   Ranks that the signal made end with the code for "stopped, can be resumed", all of them, speak for the job.
4. It is 0 only if every rank has reported its own end, with 0 and nothing left open.
5. What is not in the table cannot happen.
6. In an elastic job a rank that fails is started again while restarts are left, or the others go on while they are
   enough; its failure then does not count. This ends with the first rank that succeeds: the job is finished then.

Statuses are those of `subprocess`: an exit code, or minus the number of the signal that killed the process.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

# Ranks stop waiting for a lost peer within a second; what remains is for traceback and teardown. After SIGTERM it
# is for a last checkpoint: batch systems allow 5 to 30 s.
GRACE_S = 5.0

# Passed to the ranks as they are; any other signal that ends the job reaches them as SIGTERM: processes that don't
# write would not notice a SIGPIPE, and UCX, inside MPICH, swallows SIGHUP.
_AS_IT_IS = (signal.SIGINT, signal.SIGTERM)

# Not ranks, but they end as ranks do, and ranks cannot live without them.
MPIEXEC = -1
SERVICE = -2
LAUNCHER = -10  # of node 0; that of node n is LAUNCHER - n


class Phase(StrEnum):
    """How far the job has come."""

    RUNNING = "running"
    GRACE = "grace"  # a rank failed, the others are getting the error
    TERMINATING = "terminating"  # SIGTERM, or SIGINT from outside, was sent
    KILLING = "killing"  # SIGKILL was sent


class Happening(StrEnum):
    """What can happen, as the table sees it."""

    SUCCEEDED = "a process exited with 0"
    FAILED = "a process failed"
    LOST = "a rank of an elastic job failed, and is started again, or is not needed"
    INTERRUPTED = "the launcher got a signal"
    TIME_UP = "the time of a phase is over"


@dataclass(frozen=True, slots=True)
class Ended:
    """A process ended.

    Attributes:
        who: a rank, `MPIEXEC` or `SERVICE`.
        status: as in `subprocess`.
        secondary: whether it failed because of another rank's failure.
        left_open: what a rank should have done before an end with 0, "leaving the job"; "" if nothing.
        host: where it ran, if the job has several; "" if it has one.
        takes: who is taken to have ended with it: the ranks of a launcher that is gone.
    """

    who: int
    status: int
    secondary: bool = False
    left_open: str = ""
    host: str = ""
    takes: frozenset[int] = frozenset()

    @property
    def failed(self) -> bool:
        """Whether it is no success."""
        return self.status != 0 or self.left_open != ""

    @property
    def code(self) -> int:
        """The status as a shell's exit code: 128 + signal; 1 for an end with 0 that is no success."""
        if self.status == 0:
            return int(self.failed)
        return self.status if self.status > 0 else 128 - self.status

    def __str__(self) -> str:
        where = f" ({self.host})" if self.host else ""
        if self.who <= LAUNCHER:
            node = f"node {LAUNCHER - self.who}{where}"
            return f"the launcher of {node} is gone: it was killed, or its host can't be reached"
        name = {MPIEXEC: "mpiexec", SERVICE: "the statistics service"}.get(self.who, f"rank {self.who}{where}")
        if self.status < 0:
            return f"{name} was killed by {signal.Signals(-self.status).name}"
        if self.status == 0 and self.left_open:
            return f"{name} exited with code 0 without {self.left_open} (os._exit?): a failure, code 1"
        return f"{name} exited with code {self.status}"


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The launcher got a signal that asks it to end."""

    signal: int


@dataclass(frozen=True, slots=True)
class TimeUp:
    """The alarm rang."""


@dataclass(frozen=True, slots=True)
class SendSignal:
    """Effect: send a signal to every process that still runs."""

    signal: int


@dataclass(frozen=True, slots=True)
class Alarm:
    """Effect: ring after so many seconds, in place of any earlier alarm; None: don't ring."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Restart:
    """Effect: start a rank again.

    Attributes:
        rank: which.
        number: of this restart among those of the job, from 1.
    """

    rank: int
    number: int


@dataclass(frozen=True, slots=True)
class Elastic:
    """What a job may lose.

    Attributes:
        minimum: of ranks: with fewer it can't go on.
        restarts: that it may make.
        final: exit codes of ranks that a restart would not mend.
    """

    minimum: int
    restarts: int
    final: frozenset[int] = frozenset()


Event = Ended | Interrupted | TimeUp
Effect = SendSignal | Alarm | Restart

_AFTER = {
    (Phase.RUNNING, Happening.SUCCEEDED): Phase.RUNNING,
    (Phase.RUNNING, Happening.LOST): Phase.RUNNING,
    (Phase.RUNNING, Happening.FAILED): Phase.GRACE,
    (Phase.RUNNING, Happening.INTERRUPTED): Phase.TERMINATING,
    (Phase.GRACE, Happening.SUCCEEDED): Phase.GRACE,
    (Phase.GRACE, Happening.FAILED): Phase.GRACE,
    (Phase.GRACE, Happening.INTERRUPTED): Phase.TERMINATING,
    (Phase.GRACE, Happening.TIME_UP): Phase.TERMINATING,
    (Phase.TERMINATING, Happening.SUCCEEDED): Phase.TERMINATING,
    (Phase.TERMINATING, Happening.FAILED): Phase.TERMINATING,
    (Phase.TERMINATING, Happening.INTERRUPTED): Phase.KILLING,
    (Phase.TERMINATING, Happening.TIME_UP): Phase.KILLING,
    (Phase.KILLING, Happening.SUCCEEDED): Phase.KILLING,
    (Phase.KILLING, Happening.FAILED): Phase.KILLING,
    (Phase.KILLING, Happening.INTERRUPTED): Phase.KILLING,
}


@dataclass(frozen=True, slots=True)
class Supervision:
    """A job under way.

    Attributes:
        running: who still runs.
        phase: how far the job has come.
        ended: who ended before the launcher began to end them, in order.
        interrupted: the signal from outside, where it was the first cause.
        unreported: ranks whose mpiexec ended before they had reported their own end.
        grace_s: seconds that the others have after a failure, and once more after SIGTERM.
        stop_s: seconds that all have after a signal from outside; None: `grace_s`.
        resumable: the exit code of a rank that was stopped and can be resumed; None: there is none.
        stopped: how ranks ended that were asked to.
        elastic: what the job may lose; None: nothing.
        restarted: how many ranks were started again.
    """

    running: frozenset[int]
    phase: Phase = Phase.RUNNING
    ended: tuple[Ended, ...] = ()
    interrupted: int | None = None
    unreported: frozenset[int] = frozenset()
    grace_s: float = GRACE_S
    stop_s: float | None = None
    resumable: int | None = None
    stopped: frozenset[int] = frozenset()
    elastic: Elastic | None = None
    restarted: int = 0

    @property
    def seconds_to_kill(self) -> float:
        """What the ranks get between the signal that asks them to end and SIGKILL."""
        return self.grace_s if self.interrupted is None or self.stop_s is None else self.stop_s

    @property
    def done(self) -> bool:
        """Whether no process runs any more."""
        return not self.running

    def handle(self, event: Event) -> tuple[Supervision, list[Effect]]:
        """The job after an event, and the effects."""
        happening = _happening(event)
        if isinstance(event, Ended) and happening is Happening.FAILED and self.can_lose(event):
            return self._lose(event)
        phase = _AFTER[self.phase, happening]
        after = replace(self, phase=phase)
        if isinstance(event, Ended):
            counts = phase in (Phase.RUNNING, Phase.GRACE)
            # mpiexec ends last: a rank that has not reported by then never will
            unreported = self.running - {MPIEXEC} if event.who == MPIEXEC else frozenset()
            after = replace(
                after,
                running=self.running - unreported - event.takes - {event.who},
                ended=(*self.ended, event) if counts else self.ended,
                unreported=unreported if counts else self.unreported,
                stopped=self.stopped if counts or event.who < 0 else self.stopped | {event.code},
            )
        elif isinstance(event, Interrupted) and self.phase is Phase.RUNNING:
            after = replace(after, interrupted=event.signal)
        if phase is self.phase:
            return after, []
        return after, list(_on_entering(phase, event, self.grace_s, after.seconds_to_kill))

    @property
    def ranks(self) -> int:
        """How many ranks run."""
        return sum(1 for who in self.running if who >= 0)

    @property
    def is_finished(self) -> bool:
        """Whether a rank has succeeded: in an elastic job all do together, and nothing is to be gone on with."""
        return any(not each.failed for each in self.ended)

    def can_lose(self, end: Ended) -> bool:
        """Whether an elastic job goes on after a failure."""
        elastic = self.elastic
        if elastic is None or self.phase is not Phase.RUNNING or LAUNCHER < end.who < 0 or end.status in elastic.final:
            return False
        if self.is_finished:
            return False
        if end.who >= 0 and self.restarted < elastic.restarts:
            return True
        left = {who for who in self.running - end.takes - {end.who} if who >= 0}
        return len(left) >= elastic.minimum

    def _lose(self, end: Ended) -> tuple[Supervision, list[Effect]]:
        """A rank of an elastic job, or those of a host, failed."""
        assert self.elastic is not None
        phase = _AFTER[self.phase, Happening.LOST]
        if end.who >= 0 and self.restarted < self.elastic.restarts:
            number = self.restarted + 1
            return replace(self, phase=phase, restarted=number), [Restart(end.who, number)]
        return replace(self, phase=phase, running=self.running - end.takes - {end.who}), []

    def exit_code(self) -> int:
        """The launcher's exit code, by law 3."""
        if self.interrupted is not None:
            # A rank of an elastic job that says so answers for those that were lost, or were just being started again.
            said = {self.resumable} & self.stopped if self.elastic is not None else self.stopped
            if self.resumable is not None and said == {self.resumable}:
                return self.resumable
            return 128 + self.interrupted
        cause = self.cause
        return cause.code if cause is not None else int(bool(self.unreported))

    @property
    def cause(self) -> Ended | None:
        """The first cause, where it is an end."""
        failures = [end for end in self.ended if end.failed]
        mpiexec = next((end for end in failures if end.who == MPIEXEC), None)
        ranks = [end for end in failures if end.who != MPIEXEC]
        if mpiexec is not None and ranks:
            return _confirmed(ranks, mpiexec)
        return _first_cause(failures) if failures else None


def after_a_loss(before: Supervision, after: Supervision, end: Ended) -> str:
    """What becomes of an elastic job after a failure, as text; "" if the failure is none of a job that was going on."""
    elastic = before.elastic
    if elastic is None or not end.failed or before.phase is not Phase.RUNNING:
        return ""
    if after.restarted > before.restarted:
        return f"{end}; it is started again (restart {after.restarted} of {elastic.restarts}: --max-restarts)"
    if after.phase is Phase.RUNNING:
        return f"{end}; the job goes on with {after.ranks} rank{'s' * (after.ranks != 1)} (--elastic)"
    if after.ranks >= elastic.minimum or before.is_finished:
        return ""
    left = f"{after.ranks} ranks are" if after.ranks != 1 else "1 rank is"
    return f"{left} left, fewer than the {elastic.minimum} of --elastic, and no restart (--max-restarts)"


def _happening(event: Event) -> Happening:
    match event:
        case Ended(failed=False):
            return Happening.SUCCEEDED
        case Ended():
            return Happening.FAILED
        case Interrupted():
            return Happening.INTERRUPTED
        case TimeUp():
            return Happening.TIME_UP


def _on_entering(phase: Phase, event: Event, grace_s: float, kill_s: float) -> Iterable[Effect]:
    if phase is Phase.GRACE:
        yield Alarm(grace_s)
    elif phase is Phase.TERMINATING:
        passed_on = isinstance(event, Interrupted) and event.signal in _AS_IT_IS and event.signal
        yield SendSignal(passed_on or signal.SIGTERM)
        yield Alarm(kill_s)
    elif phase is Phase.KILLING:
        yield SendSignal(signal.SIGKILL)
        yield Alarm(None)


def _first_cause(failures: list[Ended]) -> Ended:
    """Killed by a signal, before failed on its own, before failed because of another; then the first."""
    return min(failures, key=lambda end: 0 if end.status < 0 else 2 if end.secondary else 1)


def _confirmed(ranks: list[Ended], mpiexec: Ended) -> Ended:
    """The rank that made mpiexec end the job.

    mpiexec kills the other ranks when one fails or calls `MPI_Abort`: SIGTERM and SIGKILL may be its own
    doing, and count only where its exit code names them (MPICH's is n for signal n, Open MPI's 128 + n).
    """
    own = [end for end in ranks if end.status not in (-signal.SIGTERM, -signal.SIGKILL)]
    matching = [end for end in own if not end.secondary and mpiexec.code in (end.code, -end.status)]
    killed = [end for end in ranks if end not in own and mpiexec.code in (end.code, -end.status)]
    if matching or killed:
        return (matching or killed)[0]
    return _first_cause(own) if own else mpiexec
