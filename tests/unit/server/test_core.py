"""Corners of the core that no transcript in `tests/scenarios` tells."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from bnlayer.agreement import RANKS_BLAMED, Peer
from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnserver.core.answers import DisagreementError
from bnserver.core.effects import (
    Effect,
    Enrolled,
    Failed,
    Joined,
    Persist,
    Record,
    Reduce,
    Released,
    Totals,
)
from bnserver.core.events import (
    ConnectionEnded,
    Contribute,
    Event,
    Heartbeat,
    Join,
    Leave,
    Malformed,
    Pull,
    Push,
    Stop,
    Tick,
)
from bnserver.core.gathering import GRACE_S
from bnserver.core.job import Job
from bnserver.core.journal_records import Began, Completed, Ended, JournalRecord, LayerSnapshot
from bnserver.core.members import LivenessTimeouts
from bnserver.core.reasons import Reason
from bnserver.core.service import Service
from bnserver.core.validation import validated
from support.core import SIGNATURE, STATE, effects_of, enroll, join, layers_with_one

_BARRIER = Call(Operation.BARRIER, ExchangeKey(None, None, 0), PlainSignature())


@pytest.mark.parametrize(
    ("root", "speakers", "reported"),
    [(-1, 2, []), (-1, 3, [Released]), (0, 3, [*[Failed] * 3, Persist]), (0, 2, [*[Failed] * 3, Persist])],
    ids=["agreed, one is missing", "agreed, all", "disagreed, all", "disagreed, one is missing"],
)
def test_what_becomes_of_an_operation(root: int, speakers: int, reported: list[type]) -> None:
    """It follows from two truths: whether who spoke agrees, and whether somebody may still speak, who is waited for."""
    service = Service()
    join(service, 1, 2, 3)
    calls = [_BARRIER, _BARRIER._replace(signature=PlainSignature(root=root)), _BARRIER][:speakers]
    effects = [
        effect for s, call in enumerate(calls, 1) for effect in effects_of(service, Contribute(s, 1, 1, call, None))
    ]
    if (root, speakers) == (0, 2):
        assert effects == []
        assert effects_of(service, Tick(), GRACE_S / 2) == []
        effects = effects_of(service, Tick(), GRACE_S)
    assert [type(effect) for effect in effects] == reported


@pytest.mark.parametrize(
    "event",
    [
        Contribute(7, 1, 1, _BARRIER, None),
        Pull(7, "a"),
        Push(7, "a", STATE),
        Leave(7, ""),
        ConnectionEnded(7),
        Heartbeat("j", 0, 1),
        Tick(),
    ],
)
def test_a_connection_without_a_seat_is_ignored(event: Event) -> None:
    """What a rank sent before it heard that its generation is over comes too late, and changes nothing."""
    assert Service().handle(event, 0.0) == []


def test_nonsense_without_a_seat_is_answered() -> None:
    """A client that can't be understood is told so, even before it has joined."""
    (failed,) = Service().handle(Malformed(7, "expected a join"), 0.0)
    assert isinstance(failed, Failed)
    assert (failed.reason, failed.ranks) == (Reason.INVALID, ())
    assert failed.text == "The service refused what you sent: expected a join."


def test_a_connection_that_ends_loses_its_seat() -> None:
    """Numbers of connections are not used again, but what is late must not find a seat."""
    service = Service()
    join(service, 1)
    service.handle(ConnectionEnded(1), 0.0)
    assert service.handle(Leave(1, ""), 0.0) == []


def test_a_refused_join_makes_no_job() -> None:
    """Wrong joins leave nothing behind, however many there are."""
    service = Service()
    service.handle(validated(Join(1, "j", Peer(5), 2, 9.0, 9.0)), 0.0)
    assert service.jobs == ()


def test_a_job_goes_on_from_its_snapshot() -> None:
    """What was saved is what the next run of the service owns, and generations go on counting."""
    kept = replace(STATE, version=17)
    records: list[JournalRecord] = [Ended(4), LayerSnapshot("a", kept)]
    service = Service({"j": records})
    (joined,) = join(service, 1)
    assert isinstance(joined, Joined)
    assert joined.generation == 5
    (enrolled,) = enroll(service, 1, generation=5)
    assert isinstance(enrolled, Enrolled)
    assert enrolled.state.version == 17
    assert service.states("j") == {"a": kept}


def test_of_many_missing_ranks_some_are_named() -> None:
    """The text stays readable, and fits a status, where a whole job never came."""
    service = Service()
    service.handle(Join(1, "j", Peer(0), 1000, 9.0, 9.0), 0.0)
    failed, _ = effects_of(service, Tick(), 9.0)
    assert isinstance(failed, Failed)
    assert failed.text.startswith("Ranks 1, 2, 3, ")
    assert "19, 20 and 979 more of 1000 did not join in time; rank 0 waited." in failed.text
    assert failed.ranks == tuple(range(1, 1000))


def test_a_world_of_any_announced_size_costs_no_more() -> None:
    """Neither the error nor what is kept of it grows with a number that one rank gave."""
    service = Service()
    service.handle(Join(1, "j", Peer(0), 2**20, 9.0, 9.0), 0.0)
    tracemalloc.start()
    failed, ended, _ = service.handle(Tick(), 9.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(failed, Failed)
    assert "19, 20 and 1048555 more of 1048576 did not join in time" in failed.text
    assert failed.ranks == tuple(range(1, RANKS_BLAMED + 1))
    assert isinstance(ended, Record)
    assert ended.record == Ended(1, Reason.DEADLINE, failed.text, failed.ranks)
    assert peak < 2**20


@pytest.mark.parametrize("alike", [True, False])
def test_errors_stay_short_in_a_large_job(alike: bool) -> None:
    """All of a thousand ranks may be to blame: the text names some of each group, and how many more there are."""
    service = Service(timeouts=LivenessTimeouts(lease=0))
    for rank in range(1000):
        service.handle(Join(rank + 1, "j", Peer(rank, "h" * 60, 1), 1000, 9.0, 9.0), 0.0)
    for rank in range(500):
        call = Call(Operation.BARRIER, ExchangeKey(None, None, 0 if alike else rank), PlainSignature())
        service.handle(Contribute(rank + 1, 1, 1, call, None), 0.0)
    effects = effects_of(service, Tick(), 9.0)
    texts = {effect.text for effect in effects if isinstance(effect, Failed)}
    assert len(texts) == 1
    assert len(texts.pop()) < 5_000


def test_a_contribution_to_another_generation_is_refused() -> None:
    """A rank that believes to be in a generation that is over can't add to this one."""
    service = Service()
    join(service, 1)
    failed, *_ = effects_of(service, Contribute(1, 2, 1, _BARRIER, None))
    assert isinstance(failed, Failed)
    assert "expected contributions to generation 1, which is running; received one to 2" in failed.text


def test_a_contribution_before_all_have_joined_is_refused() -> None:
    """Nobody can take part in a job that has not begun."""
    service = Service()
    service.handle(Join(1, "j", Peer(0), 2, 9.0, 9.0), 0.0)
    failed, saved = effects_of(service, Contribute(1, 1, 1, _BARRIER, None))
    assert isinstance(failed, Failed)
    assert "generation 1, which is not complete yet" in failed.text
    assert saved == Persist("j")


def test_another_call_while_one_waits_is_refused() -> None:
    """The same number with another content is no repetition."""
    service = Service()
    join(service, 1, 2)
    service.handle(Contribute(1, 1, 1, _BARRIER, None), 0.0)
    other = _BARRIER._replace(key=ExchangeKey(None, None, 1))
    failed, *_ = effects_of(service, Contribute(1, 1, 1, other, None))
    assert isinstance(failed, Failed)
    assert "expected nothing while contribution 1 waits for its answer, received another" in failed.text


def test_a_leave_while_its_own_call_waits_counts() -> None:
    """An interrupted rank says goodbye in the middle of an exchange: the others don't complete without it."""
    service = Service()
    join(service, 1, 2)
    service.handle(Contribute(1, 1, 1, _BARRIER, None), 0.0)
    assert not any(isinstance(effect, Failed) for effect in service.handle(Leave(1, ""), 0.0))
    (failed, saved) = effects_of(service, Contribute(2, 1, 1, _BARRIER, None))
    assert isinstance(failed, Failed)
    assert failed.reason is Reason.STALL
    assert failed.text.startswith("rank 0 (host h, pid 1) left the job, while rank 1 (host h, pid 2) waits")
    assert saved == Persist("j")


def test_a_bad_push_ends_the_connection() -> None:
    """Numbers that are not finite never become the owner's."""
    service = Service()
    join(service, 1)
    bad = replace(STATE, moving=STATE.moving._replace(mean=np.array([np.nan], np.float32)))
    failed, saved = effects_of(service, validated(Push(1, "a", bad)))
    assert isinstance(failed, Failed)
    assert failed.reason is Reason.INVALID
    assert "expected finite numbers in moving_mean" in failed.text
    assert saved == Persist("j")
    assert service.states("j") == {}


def test_a_stopped_service_tells_nobody_twice() -> None:
    """After the stop all seats are empty."""
    service = Service()
    join(service, 1)
    (failed, _) = effects_of(service, Stop())
    assert isinstance(failed, Failed)
    assert failed.reason is Reason.STOPPING
    assert service.handle(Stop(), 0.0) == []


def test_a_reduction_is_in_rank_order() -> None:
    """Whoever comes first: the float sum starts with rank 0."""
    service = Service()
    join(service, 1, 2)
    call = Call(Operation.REDUCE, ExchangeKey(None, None, 0), PlainSignature("sum", ("x",)))
    service.handle(Contribute(2, 1, 1, call, (np.ones(1),)), 0.0)
    (reduce,) = effects_of(service, Contribute(1, 1, 1, call, (np.zeros(1),)))
    assert isinstance(reduce, Reduce)
    assert [arrays[0].tolist() for arrays in reduce.contributions] == [[0.0], [1.0]]
    assert reduce.connections == (1, 2)


def test_the_limbs_of_a_rank_are_not_written_to() -> None:
    """Adding on arrival must not write into what a rank sent: it is the message's memory."""
    service = Service()
    join(service, 1, 2)
    enroll(service, 1)
    enroll(service, 2)
    call = Call(Operation.PROBE, ExchangeKey("a", Direction.FORWARD, 0), SIGNATURE)
    first, second = np.array([[1], [2]]), np.array([[3], [0]])
    service.handle(Contribute(1, 1, 2, call, first), 0.0)
    (totals,) = effects_of(service, Contribute(2, 1, 2, call, second))
    assert isinstance(totals, Totals)
    assert totals.limbs.tolist() == [[3], [2]]
    assert (first.tolist(), second.tolist()) == ([[1], [2]], [[3], [0]])


@pytest.mark.parametrize(
    ("key", "signature", "text"),
    [
        (
            ExchangeKey("b", Direction.FORWARD, 0),
            SIGNATURE,
            "The owner knows no layer 'b': enroll it first, on every rank.",
        ),
        (
            ExchangeKey("a", Direction.FORWARD, 0),
            replace(SIGNATURE, channels=2),
            "the ranks have 2 channels in float32",
        ),
    ],
)
def test_limbs_for_another_layer_are_refused(key: ExchangeKey, signature: LayerSignature, text: str) -> None:
    """All ranks may agree on a layer that their owner does not have."""
    layers = layers_with_one()
    record = Completed(1, Call(Operation.PROBE, key, signature), np.zeros((2, signature.channels), np.int64))
    with pytest.raises(DisagreementError, match=text):
        layers.completed(record)


def test_a_mask_can_not_change_within_an_exchange() -> None:
    """After the probe the ranks must send the sums of the same call."""
    layers = layers_with_one()
    call = Call(Operation.PROBE, ExchangeKey("a", Direction.FORWARD, 0), SIGNATURE)
    layers.completed(Completed(1, call, np.zeros((2, 1), np.int64)))
    masked = replace(SIGNATURE, masked=True)
    call = Call(Operation.SUMS, ExchangeKey("a", Direction.FORWARD, 0), masked, 1)
    with pytest.raises(DisagreementError, match="epsilon or the mask changed in the middle of an exchange"):
        layers.completed(Completed(1, call, np.zeros((6, 1), np.int64)))


def test_what_is_over_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick looked at each of 20,000 jobs that were over, ten times a second, and a stop told each of them."""
    touched: list[str] = []
    for name in ("tick", "stop"):
        action = getattr(Job, name)

        def counted(job: Job, *arguments: object, action: Callable[..., list[Effect]] = action) -> list[Effect]:
            touched.append(job.name)
            return action(job, *arguments)

        monkeypatch.setattr(Job, name, counted)
    service = Service({f"over-{number}": [Ended(1)] for number in range(20_000)})
    assert len(service.jobs) == 20_000
    for job in ("leaves", "fails", "stays"):
        join(service, *((1, 2) if job == "leaves" else (3, 4) if job == "fails" else (5, 6)), job=job)
    assert list(service.active) == ["leaves", "fails", "stays"]
    service.handle(Leave(1, ""), 0.0)
    service.handle(Leave(2, ""), 0.0)
    service.handle(Leave(3, "failed"), 0.0)
    service.handle(Tick(), 0.1)
    assert touched == ["fails", "stays"]
    service.handle(Tick(), 1.0)
    assert list(service.active) == ["stays"]
    assert service.is_over("leaves")
    assert service.is_over("fails")
    touched.clear()
    service.handle(Tick(), 1.1)
    service.handle(Stop(), 1.2)
    assert touched == ["stays", "stays"]
    assert not service.active


def test_a_job_that_is_over_leaves_its_statistics_alone_behind() -> None:
    """What led to them is for ranks that are still in it: a snapshot and the memory hold the state of each layer."""
    service = Service()
    join(service, 1)
    enroll(service, 1)
    call = Call(Operation.PROBE, ExchangeKey("a", Direction.FORWARD, 0), SIGNATURE)
    effects_of(service, Contribute(1, 1, 2, call, np.zeros((2, 1), np.int64)))
    assert [type(record) for record in service.records("j")] == [Ended, Began, LayerSnapshot, Completed]
    effects_of(service, Leave(1, ""))
    assert [type(record) for record in service.records("j")] == [Ended, LayerSnapshot]


def test_a_job_that_is_over_can_be_forgotten_and_recalled() -> None:
    """Ranks of the generation that failed still hear why, and the next one goes on from its statistics."""
    service = Service()
    join(service, 1, 2)
    for connection in (1, 2):
        enroll(service, connection)
    with pytest.raises(AssertionError, match="job 'j' is not over"):
        service.forget("j")
    effects_of(service, Stop())
    records = service.records("j")
    service.forget("j")
    assert not service.knows("j")
    service.recall("j", records, 1.0)
    assert service.records("j")[0] == records[0]
    assert list(service.states("j")) == ["a"]
