"""What a launcher decides: phases, signals and exit codes, without a process."""

from __future__ import annotations

import signal
from itertools import product

import pytest

from bnworker.launcher.supervision import (
    _AFTER,
    GRACE_S,
    LAUNCHER,
    MPIEXEC,
    SERVICE,
    Alarm,
    Effect,
    Elastic,
    Ended,
    Event,
    Happening,
    Interrupted,
    Phase,
    Restart,
    SendSignal,
    Supervision,
    TimeUp,
    after_a_loss,
)

TERM, KILL, INT = signal.SIGTERM, signal.SIGKILL, signal.SIGINT


def play(ranks: int, *events: Event, mpiexec: bool = False) -> tuple[Supervision, list[Effect]]:
    """A job after some events, and everything that was to be done."""
    job = Supervision(frozenset(range(ranks)) | ({MPIEXEC} if mpiexec else set()))
    done: list[Effect] = []
    for event in events:
        job, effects = job.handle(event)
        done += effects
    return job, done


def test_every_pair_is_decided_or_cannot_happen() -> None:
    """The table is complete: time is up only in phases that set an alarm; ranks are lost while all is well."""
    impossible = {(Phase.RUNNING, Happening.TIME_UP), (Phase.KILLING, Happening.TIME_UP)}
    impossible |= {(phase, Happening.LOST) for phase in Phase if phase is not Phase.RUNNING}
    assert set(product(Phase, Happening)) - set(_AFTER) == impossible


def test_phases_only_go_on() -> None:
    """A job never goes back to an earlier phase."""
    order = list(Phase)
    assert all(order.index(after) >= order.index(before) for (before, _), after in _AFTER.items())


def test_success_needs_everybody() -> None:
    """The job is done when the last rank is, and its code is 0."""
    job, done = play(2, Ended(1, 0))
    assert (job.done, done) == (False, [])
    job, done = play(2, Ended(1, 0), Ended(0, 0))
    assert (job.done, job.exit_code(), done) == (True, 0, [])


def test_a_failure_gives_the_others_time_then_ends_them() -> None:
    """Grace, SIGTERM, SIGKILL, in this order, each after its time."""
    job, done = play(3, Ended(1, 7), TimeUp(), TimeUp())
    assert done == [Alarm(GRACE_S), SendSignal(TERM), Alarm(GRACE_S), SendSignal(KILL), Alarm(None)]
    assert job.running == {0, 2}
    assert job.exit_code() == 7


def test_ranks_that_the_launcher_ended_do_not_count() -> None:
    """A rank that dies of our SIGTERM, or answers it with an exit code, is not why the job failed."""
    job, _ = play(3, Ended(1, 7), TimeUp(), Ended(0, -TERM), Ended(2, 3))
    assert (job.done, job.exit_code()) == (True, 7)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([Ended(0, 3), Ended(1, 4)], 3),
        ([Ended(1, 4), Ended(0, 3)], 4),
        ([Ended(0, 1), Ended(1, -KILL)], 137),  # killed outranks exited, whoever was seen first
        ([Ended(0, 1, secondary=True), Ended(1, 7)], 7),  # told comes last, even if it came first
        ([Ended(0, 1, secondary=True), Ended(1, 0)], 1),  # but it is a failure
        ([Ended(0, 1, secondary=True), Ended(1, -signal.SIGSEGV)], 139),
        ([Ended(1, 0, left_open="leaving the job"), Ended(0, 0)], 1),
        ([Ended(0, 3, secondary=True), Ended(1, 0, left_open="leaving the job")], 1),
        ([Ended(SERVICE, -KILL), Ended(0, 1, secondary=True), Ended(1, 1, secondary=True)], 137),
    ],
)
def test_the_exit_code_is_the_first_cause(ends: list[Ended], code: int) -> None:
    """Law 3, case by case."""
    assert play(2, *ends)[0].exit_code() == code


@pytest.mark.parametrize(("number", "code"), [(INT, 130), (TERM, 143)])
def test_a_signal_is_passed_on_and_sets_the_code(number: int, code: int) -> None:
    """Whatever the ranks then exit with."""
    job, done = play(2, Interrupted(number), Ended(0, 0), Ended(1, 5))
    assert done == [SendSignal(number), Alarm(GRACE_S)]
    assert job.exit_code() == code


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([75, 75], 75),
        ([75, -KILL], 143),  # one was too slow: it may be the one that writes the checkpoint
        ([75, 0], 143),
        ([143, 143], 143),
    ],
)
def test_ranks_that_were_stopped_and_can_be_resumed(ends: list[int], code: int) -> None:
    """All of them say so, or the code is that of the signal; mpiexec's own code does not count."""
    job = Supervision(frozenset({0, 1, MPIEXEC}), resumable=75)
    for event in (Interrupted(TERM), Ended(0, ends[0]), Ended(1, ends[1]), Ended(MPIEXEC, 143)):
        job, _ = job.handle(event)
    assert (job.done, job.exit_code()) == (True, code)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([75, 75], 75),
        ([-KILL, 75], 75),  # it was lost as the signal came
        ([-TERM, 75], 75),  # it was just being started again, and did not take note of signals yet
        ([-TERM, -TERM], 143),
        ([1, 143], 143),
    ],
)
def test_an_elastic_job_that_was_stopped_while_a_rank_was_lost(ends: list[int], code: int) -> None:
    """Those that are left have written the checkpoint: one that says so speaks for the job."""
    job = Supervision(frozenset({0, 1, 2}), resumable=75, elastic=Elastic(2, 1))
    job, effects = job.handle(Ended(0, -KILL))
    assert effects == [Restart(0, 1)]
    for event in (Interrupted(TERM), Ended(0, ends[0]), Ended(1, ends[1]), Ended(2, ends[1])):
        job, effects = job.handle(event)
        assert Restart(0, 1) not in effects
    assert (job.done, job.exit_code()) == (True, code)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGPIPE, 141)])
def test_a_lost_terminal_or_reader_ends_the_job_with_sigterm(number: int, code: int) -> None:
    """The ranks may not notice a SIGPIPE, nor a SIGHUP; the code says what came."""
    job, done = play(1, Interrupted(number), Ended(0, -TERM))
    assert done[0] == SendSignal(TERM)
    assert job.exit_code() == code


def test_the_grace_is_the_users() -> None:
    """Once after the failure, once more after SIGTERM."""
    job = Supervision(frozenset({0, 1}), grace_s=30)
    job, grace = job.handle(Ended(1, 7))
    _, termination = job.handle(TimeUp())
    assert (grace, termination) == ([Alarm(30)], [SendSignal(TERM), Alarm(30)])


def test_a_signal_from_outside_may_have_a_grace_of_its_own() -> None:
    """For a checkpoint and a report; a failure keeps the other one, before SIGTERM and after it."""
    job = Supervision(frozenset({0, 1}), grace_s=5, stop_s=30)
    assert job.handle(Interrupted(INT))[1] == [SendSignal(INT), Alarm(30)]
    failed, grace = job.handle(Ended(1, 7))
    assert (grace, failed.handle(TimeUp())[1]) == ([Alarm(5)], [SendSignal(TERM), Alarm(5)])


def test_a_second_signal_kills() -> None:
    """Ctrl-C twice: no more waiting."""
    job, done = play(1, Interrupted(INT), Interrupted(INT))
    assert done == [SendSignal(INT), Alarm(GRACE_S), SendSignal(KILL), Alarm(None)]
    assert job.exit_code() == 130


def test_a_signal_after_a_failure_keeps_the_failure() -> None:
    """The first cause was the rank."""
    assert play(2, Ended(0, 7), Interrupted(INT), Ended(1, -INT))[0].exit_code() == 7


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        # MPICH says 7 or a number made of everybody's; a rank said 7 itself.
        ([Ended(1, 7), Ended(MPIEXEC, 9)], 7),
        # mpiexec ended the others because rank 1 exited.
        ([Ended(0, -TERM), Ended(1, 5), Ended(MPIEXEC, 5)], 5),
        ([Ended(0, -KILL), Ended(1, 5), Ended(MPIEXEC, 5)], 5),
        # Somebody killed rank 1: MPICH says 9, Open MPI 137.
        ([Ended(1, -KILL), Ended(0, 1, secondary=True), Ended(MPIEXEC, 9)], 137),
        ([Ended(1, -KILL), Ended(0, -TERM), Ended(MPIEXEC, 137)], 137),
        ([Ended(1, -signal.SIGSEGV), Ended(0, -TERM), Ended(MPIEXEC, 139)], 139),
        ([Ended(1, -signal.SIGSEGV), Ended(MPIEXEC, 11)], 139),
        # MPI_Abort(3): mpiexec alone knows.
        ([Ended(0, -KILL), Ended(1, -KILL), Ended(MPIEXEC, 3)], 3),
        # It could not start them.
        ([Ended(MPIEXEC, 213)], 213),
        # All ranks were content, mpiexec was not.
        ([Ended(0, 0), Ended(1, 0), Ended(MPIEXEC, 1)], 1),
        ([Ended(0, 0), Ended(1, 0), Ended(MPIEXEC, 0)], 0),
        # MPICH kills the others of a rank that does not finalize, and may say 0, 1 or 9.
        ([Ended(1, 0), Ended(MPIEXEC, 0)], 1),
        ([Ended(1, 0, left_open="leaving the job"), Ended(MPIEXEC, 9)], 1),
        ([Ended(1, 0, left_open="leaving the job"), Ended(0, -TERM), Ended(MPIEXEC, 1)], 1),
    ],
)
def test_under_mpiexec_its_own_signals_do_not_count(ends: list[Ended], code: int) -> None:
    """Which of the deaths was the cause is told by the ranks' statuses and mpiexec's own code together."""
    job, _ = play(2, *ends, mpiexec=True)
    assert (job.done, job.exit_code()) == (True, code)


def test_ranks_that_did_not_report_are_named() -> None:
    """Until mpiexec ends, a rank may still report; ranks that the launcher is ending need not."""
    job, _ = play(3, Ended(1, 0), Ended(MPIEXEC, 0), mpiexec=True)
    assert job.unreported == {0, 2}
    job, _ = play(3, Ended(1, 7), TimeUp(), Ended(MPIEXEC, 7), mpiexec=True)
    assert (job.done, job.unreported, job.exit_code()) == (True, frozenset(), 7)


def test_the_description_of_an_end() -> None:
    """The line that the user reads."""
    assert str(Ended(1, 0, left_open="leaving the job")) == (
        "rank 1 exited with code 0 without leaving the job (os._exit?): a failure, code 1"
    )
    assert str(Ended(2, 7)) == "rank 2 exited with code 7"
    assert str(Ended(2, -KILL)) == "rank 2 was killed by SIGKILL"
    assert str(Ended(MPIEXEC, 1)) == "mpiexec exited with code 1"
    assert str(Ended(SERVICE, -KILL)) == "the statistics service was killed by SIGKILL"


def test_the_loss_of_a_launcher_ends_its_ranks() -> None:
    """On another host: they count as ended, and it as killed: the first cause, before ranks that were told of it."""
    lost = Ended(LAUNCHER - 1, -KILL, host="two", takes=frozenset({2, 3}))
    secondary = (Ended(0, 1, secondary=True, host="one"), Ended(1, 1, secondary=True, host="one"))
    for events in ((lost, *secondary), (*secondary, lost)):
        job, done = play(4, *events)
        assert (job.done, job.exit_code(), done) == (True, 137, [Alarm(GRACE_S)])
        assert job.cause is lost
    assert str(lost) == "the launcher of node 1 (two) is gone: it was killed, or its host can't be reached"
    assert str(secondary[0]) == "rank 0 (one) exited with code 1"
    job, _ = play(4, Interrupted(INT), lost)
    assert (sorted(job.running), job.exit_code()) == ([0, 1], 130)


def elastic(ranks: int, minimum: int, restarts: int, *events: Event) -> tuple[Supervision, list[Effect], list[str]]:
    """An elastic job after some events, everything that was to be done, and what was said."""
    job = Supervision(frozenset(range(ranks)), elastic=Elastic(minimum, restarts, frozenset({2})))
    done: list[Effect] = []
    said: list[str] = []
    for event in events:
        before = job
        job, effects = job.handle(event)
        done += effects
        if isinstance(event, Ended) and (text := after_a_loss(before, job, event)):
            said.append(text)
    return job, done, said


def test_an_elastic_job_starts_lost_ranks_again_then_goes_on_without() -> None:
    """While restarts are left, and then while enough ranks are; what was lost does not count for the exit code."""
    job, done, said = elastic(4, 2, 1, Ended(1, -KILL), Ended(1, 1), Ended(3, -KILL), Ended(0, 0), Ended(2, 0))
    assert done == [Restart(1, 1)]
    assert said == [
        "rank 1 was killed by SIGKILL; it is started again (restart 1 of 1: --max-restarts)",
        "rank 1 exited with code 1; the job goes on with 3 ranks (--elastic)",
        "rank 3 was killed by SIGKILL; the job goes on with 2 ranks (--elastic)",
    ]
    assert (job.done, job.exit_code()) == (True, 0)


def test_an_elastic_job_with_too_few_ranks_fails() -> None:
    """The one that was one too many is the first cause."""
    job, done, said = elastic(3, 2, 0, Ended(0, 7), Ended(2, -KILL), Ended(1, 1, secondary=True))
    assert said[1] == "1 rank is left, fewer than the 2 of --elastic, and no restart (--max-restarts)"
    assert (job.done, job.exit_code(), done) == (True, 137, [Alarm(GRACE_S)])


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ((Ended(0, 0), Ended(1, -KILL)), 137),  # after one has succeeded
        ((Ended(1, 2), Ended(0, 1, secondary=True)), 2),  # nothing that a restart would mend
        ((Ended(SERVICE, -KILL), Ended(0, 1, secondary=True), Ended(1, 1, secondary=True)), 137),
        ((Interrupted(INT), Ended(0, -INT), Ended(1, -INT)), 130),
    ],
)
def test_what_an_elastic_job_does_not_survive(events: tuple[Event, ...], code: int) -> None:
    """It ends as others do: nothing is started again."""
    job, done, said = elastic(2, 1, 3, *events)
    assert (job.exit_code(), said) == (code, [])
    assert not any(isinstance(effect, Restart) for effect in done)


def test_a_host_of_an_elastic_job_is_lost() -> None:
    """Nobody could start its ranks again: the others go on, if they are enough."""
    lost_node = Ended(LAUNCHER - 1, -KILL, host="two", takes=frozenset({2, 3}))
    job, done, said = elastic(4, 2, 3, lost_node, Ended(0, 0), Ended(1, 0))
    assert (job.done, job.exit_code(), done) == (True, 0, [])
    assert said == [f"{lost_node}; the job goes on with 2 ranks (--elastic)"]
    assert elastic(4, 3, 3, lost_node)[0].phase is Phase.GRACE
