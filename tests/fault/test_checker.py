"""The history checker itself: it accepts an honest history, worked out by hand, and catches each kind of lie.

Two ranks, one layer of three channels that all see the same: rank 0 the value 1, rank 1 the value 3. Around the
pivot 2, the deviations −1 and 1 are −2^40 and 2^40 units of 2^(6 − 46), their squares 2^40 units of 2^(12 − 52).
The mean is 2, the variance 1; with momentum 0.9, the moving mean goes from 0 to 0.2, the moving variance stays at 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from support.fault.history import Op, Record
from support.fault.model import check, timeline

History = list[Record]
Histories = list[History]


def _limbs(*rows: int) -> str:
    return np.repeat(np.array(rows, "<i8")[:, np.newaxis], 3, axis=1).tobytes().hex()


def _statistics(mean: float, variance: float) -> str:
    return np.repeat(np.array([mean, variance], "<f4"), 3).tobytes().hex()


def _key(value: float) -> int:
    """A probe's key of a float32 number."""
    bits = int(np.float32(value).view(np.int32))
    return bits ^ ((bits >> 31) & 0x7FFF_FFFF)


_SEED = _statistics(0.0, 1.0)
_ONE = _statistics(0.2, 1.0)
_TWO = _statistics(float(np.float32(0.2)) * 0.9 + 0.2, 1.0)
_SENT = [_limbs(-(2**8), 0, 2**8, 0, 1, 0), _limbs(2**8, 0, 2**8, 0, 1, 0)]
_TOTAL = _limbs(0, 0, 2**9, 0, 2, 0)
_PROBES = [_limbs(_key(1.0), _key(-1.0)), _limbs(_key(3.0), _key(-3.0))]
_PROBED = _limbs(_key(3.0), _key(-1.0))


def _honest() -> Histories:
    """Enrolment, two steps forward, a barrier, a push by rank 0, a barrier, a pull by both."""
    return [_rank(rank) for rank in range(2)]


def _rank(rank: int) -> History:
    history: History = []

    def add(
        op: Op, direction: str, step: int, attempt: int, sent: str, got: str, version: int, layer: str = "a"
    ) -> None:
        at = float(len(history))
        history.append(Record(op, layer, direction, step, attempt, sent, got, version, at, at + 0.5))

    add("enroll", "", 0, 0, _SEED if rank == 0 else _statistics(9.0, 9.0), _SEED, 0)
    add("probe", "forward", 0, 0, _PROBES[rank], _PROBED, 0)
    add("sums", "forward", 0, 1, _SENT[rank], _TOTAL, 1)
    add("sums", "backward", 0, 0, _limbs(rank, 0, 0, 0, 0, 0), _limbs(1, 0, 0, 0, 0, 0), 1)
    add("sums", "forward", 1, 0, _SENT[rank], _TOTAL, 2)
    add("allreduce", "", 1, 0, np.float32(0.5).tobytes().hex(), np.float32(1.0).tobytes().hex(), -1, layer="")
    add("barrier", "", 1, 0, "", "", -1, layer="before")
    if rank == 0:
        add("push", "", 1, 0, _statistics(7.0, 1.0), _statistics(7.0, 1.0), 3)
    add("barrier", "", 1, 0, "", "", -1, layer="after")
    add("pull", "", 1, 0, "", _statistics(7.0, 1.0), 3)
    return history


_OWNER = {"a": (_statistics(7.0, 1.0), 3)}


def test_an_honest_history_is_accepted() -> None:
    """Worked out by hand, not by the model."""
    assert check(_honest(), _OWNER) == []


def test_the_moving_update_is_the_one_of_the_formula() -> None:
    """Once, in float64, rounded to float32."""
    assert check([history[:3] for history in _honest()], {"a": (_ONE, 1)}) == []
    assert check([history[:5] for history in _honest()], {"a": (_TWO, 2)}) == []


def test_a_timeline_holds_every_state_once() -> None:
    """As a lone rank sees them, over two runs of a job: what an owner that was cut short may have gone back to."""
    total = _limbs(2**8, 0, 2**8, 0, 1, 0)
    alone = Record("sums", "a", "forward", 0, 1, total, total, 1, 0.0, 0.0)
    probe = Record("probe", "a", "forward", 0, 0, _PROBED, _PROBED, 0, 0.0, 0.0)
    enrolled = _honest()[0][0]
    first, second = timeline([[enrolled, probe, alone]])[1:]
    assert first == {"a": (_SEED, 0)}
    assert second["a"][1] == 1
    reenrolled = replace(enrolled, got=second["a"][0], version=1)
    assert timeline([[enrolled, probe, alone]], [[reenrolled]]) == [{}, first, second]


def _change(histories: Histories, index: int, rank: int | None = None, **fields: object) -> None:
    for number, history in enumerate(histories):
        if rank in (None, number):
            history[index] = replace(history[index], **fields)  # type: ignore[arg-type]  # the fields of a record


def _lost_contribution(histories: Histories) -> None:
    _change(histories, 4, got=_SENT[0])


def _doubled_contribution(histories: Histories) -> None:
    _change(histories, 4, got=_limbs(2**8, 0, 3 * 2**8, 0, 3, 0))


def _stale_total(histories: Histories) -> None:
    """The answer to another exchange."""
    _change(histories, 3, got=_TOTAL)


def _answers_differ(histories: Histories) -> None:
    _change(histories, 4, rank=1, got=_SENT[1])


def _doubled_update(histories: Histories) -> None:
    _change(histories, 4, version=3)


def _lost_update(histories: Histories) -> None:
    _change(histories, 4, version=1)


def _lost_record(histories: Histories) -> None:
    del histories[1][4]


def _lost_on_all(histories: Histories) -> None:
    for history in histories:
        del history[2]


def _doubled_record(histories: Histories) -> None:
    histories[1].insert(4, histories[1][4])


def _doubled_on_all(histories: Histories) -> None:
    for history in histories:
        history.insert(4, history[4])


def _swapped(histories: Histories) -> None:
    histories[1][3], histories[1][4] = histories[1][4], histories[1][3]


def _swapped_on_all(histories: Histories) -> None:
    for history in histories:
        history[2], history[4] = history[4], history[2]


def _cut_short(histories: Histories) -> None:
    del histories[1][-3:]


def _doubled_push(histories: Histories) -> None:
    _change(histories, 7, rank=0, version=4)
    _change(histories, 9, rank=0, version=4)
    _change(histories, 8, rank=1, version=4)


def _lost_push(histories: Histories) -> None:
    _change(histories, 8, rank=1, got=_TWO, version=2)


def _wrong_seed(histories: Histories) -> None:
    _change(histories, 0, got=_statistics(9.0, 9.0))


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (_lost_contribution, "sums a forward step 1 round 0: what came out on rank 0: expected"),
        (_doubled_contribution, "sums a forward step 1 round 0: what came out on rank 0: expected"),
        (_stale_total, "sums a backward step 0 round 0: what came out on rank 0: expected"),
        (_answers_differ, "sums a forward step 1 round 0: what came out on rank 1: expected"),
        (_doubled_update, "the version told to rank 0: expected 2, found 3"),
        (_lost_update, "the version told to rank 0: expected 2, found 1"),
        (
            _lost_record,
            "exchange 4: rank 0 has sums a forward step 1 round 0; rank 1 has allreduce plain step 1 round 0",
        ),
        (_lost_on_all, "rank 0 has sums a forward step 1 round 0 after probe a forward step 0 round 0"),
        (_doubled_record, "rank 1 has sums a forward step 1 round 0 twice"),
        (_doubled_on_all, "rank 0 has sums a forward step 1 round 0 twice"),
        (_swapped, "exchange 3: rank 0 has sums a backward step 0 round 0; rank 1 has sums a forward step 1 round 0"),
        (_swapped_on_all, "rank 0 has sums a forward step 1 round 0 after probe a forward step 0 round 0"),
        (_cut_short, "exchange 6: rank 0 has barrier before step 1 round 0; rank 1 has none"),
        (_doubled_push, "push a step 1 round 0: what the owner answered: expected"),
        (_lost_push, "pull a step 1 round 0: what the owner answered: expected"),
        (_wrong_seed, "enroll a step 0 round 0: what came out on rank 0: expected"),
    ],
)
def test_a_false_history_is_detected(lie: Callable[[Histories], None], message: str) -> None:
    """What was lost, doubled, swapped or told differently is named."""
    histories = _honest()
    lie(histories)
    wrong = check(histories, _OWNER)
    assert any(message in line for line in wrong), wrong


@pytest.mark.parametrize("owner", [{"a": (_TWO, 3)}, {"a": (_statistics(7.0, 1.0), 4)}, {}, {"b": _OWNER["a"]}])
def test_what_the_service_holds_in_the_end_is_compared(owner: dict[str, tuple[str, int]]) -> None:
    """Its statistics, its version, and which layers it has."""
    assert any("the service holds" in line for line in check(_honest(), owner))


def test_what_all_ranks_set_counts_once() -> None:
    """With the exchange that says so, on every rank alike."""
    histories = [history[:5] for history in _honest()]
    _change(histories, 4, set=_statistics(7.0, 1.0))
    assert check(histories, {"a": (_statistics(7.0 * 0.9 + 2.0 * (1.0 - 0.9), 1.0), 2)}) == []
    assert check(histories, {"a": (_TWO, 2)}) != []
    _change(histories, 4, rank=1, set="")
    assert any("sums a forward step 1 round 0: what rank 1 set: expected" in line for line in check(histories))
