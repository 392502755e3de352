"""What is asked next: probes when needed, at most one an exchange, and alike on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from bnlayer import BatchNormalization
from bnlayer.collective import Call, Operation
from support.families import draw
from support.ranks import Meeting, SimulatedRank, run_all


def exchanges(family: str, steps: int, rows: int = 64, dtype: str = "float32") -> list[Call]:
    """What two ranks said in a number of training steps."""
    meeting = Meeting(2)

    def body(rank: SimulatedRank) -> None:
        bn = BatchNormalization(synchronized=True, name="bn", collective=rank, dtype=dtype)
        for step in range(steps):
            x = draw(family, 0, step, (rows, 4), dtype)[rank.rank :: 2]
            bn(x, training=True)
            bn.backward(draw("normal", 1, step, (rows, 4), dtype)[rank.rank :: 2])

    run_all(meeting, body)
    return meeting.calls


def count(calls: list[Call], operation: Operation) -> int:
    """How many of an operation."""
    return sum(call.operation is operation for call in calls)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steady_state_is_one_exchange_a_direction(dtype: str) -> None:
    """200 steps of normal data: one enrolment, a probe each way, then sums alone, numbered without a gap."""
    enrolment, *first = [Operation.ENROLL, Operation.PROBE, Operation.SUMS, Operation.PROBE, Operation.SUMS]
    calls = exchanges("normal", 200, dtype=dtype)
    assert [call.operation for call in calls] == [enrolment, *first, *[Operation.SUMS] * 2 * 199]
    sums = [(call.key.direction, call.key.step) for call in calls if call.operation is Operation.SUMS]
    assert sums == [(direction, step) for step in range(200) for direction in ("forward", "backward")]


def test_a_jump_of_scale_costs_one_probe_each_way() -> None:
    """Up: a value falls outside the window. Down: the window has become too coarse. Both regrid within the exchange."""
    calls = exchanges("jump", 5)
    forward = [(call.operation, call.key.step, call.attempt) for call in calls if call.key.direction == "forward"]
    attempts = [(Operation.SUMS, 0), (Operation.PROBE, 1), (Operation.SUMS, 2)]
    assert forward[:2] == [(Operation.PROBE, 0, 0), (Operation.SUMS, 0, 1)]
    jumps = [(op, step, attempt) for step in (1, 2) for op, attempt in attempts]
    # From 1 to 1e-6 and back the spread stays below epsilon, which the window need not resolve.
    assert forward[2:] == [*jumps, (Operation.SUMS, 3, 0), (Operation.SUMS, 4, 0)]


def test_constant_data_asks_for_no_second_probe() -> None:
    """A channel without a range has no window that could be too coarse; each new constant is out of range once."""
    meeting = Meeting(1)

    def body(rank: SimulatedRank) -> None:
        bn = BatchNormalization(synchronized=True, name="bn", collective=rank)
        for _ in range(4):
            bn(np.full((8, 2), 3.25), training=True)

    run_all(meeting, body)
    assert count(meeting.calls, Operation.PROBE) == 1


def test_nan_data_does_not_probe_for_ever() -> None:
    """A nonfinite channel asks for nothing: it stays nonfinite on any grid."""
    meeting = Meeting(1)

    def body(rank: SimulatedRank) -> None:
        bn = BatchNormalization(synchronized=True, name="bn", collective=rank)
        for step in range(4):
            x = draw("normal", 0, step, (16, 2), "float32")
            x[3, 0] = np.nan
            bn(x, training=True)

    run_all(meeting, body)
    assert count(meeting.calls, Operation.PROBE) == 1


def test_bytes_depend_on_channels_never_on_rows() -> None:
    """Raw activations never cross the wire: 6 words a channel and direction, 2 for a probe."""

    def sent(rows: int, channels: int) -> int:
        meeting = Meeting(2)

        def body(rank: SimulatedRank) -> None:
            bn = BatchNormalization(synchronized=True, name="bn", collective=rank)
            x = draw("normal", 0, 0, (rows, channels), "float32")
            bn(x, training=True)
            bn.backward(x)

        run_all(meeting, body)
        return meeting.bytes_sent

    assert sent(10, 7) == sent(1000, 7) == 7 * (6 + 2) * 2 * 8
    assert sent(10, 14) == 2 * sent(10, 7)


def test_all_ranks_empty_completes_and_updates_nothing() -> None:
    """pytorch #36530, #74944: a rank without rows crashed or hung the others."""

    def body(rank: SimulatedRank) -> tuple[list[float], tuple[int, ...]]:
        bn = BatchNormalization(synchronized=True, name="bn", collective=rank)
        empty = np.zeros((0, 2), np.float32)
        bn(empty, training=True)
        return bn.moving_variance.value.tolist(), bn.backward(empty).shape

    assert run_all(Meeting(3), body) == [([1.0, 1.0], (0, 2))] * 3


def test_rank_0_seeds_the_others() -> None:
    """Initial moving statistics that differ between ranks would otherwise never meet again."""

    def body(rank: SimulatedRank) -> bytes:
        start = float(rank.rank)
        bn = BatchNormalization(
            synchronized=True, name="bn", collective=rank, moving_mean_initializer=lambda s, d: np.full(s, start, d)
        )
        bn(np.ones((2, 2)), training=True)
        return bn.moving_mean.value.tobytes()

    assert len(set(run_all(Meeting(2), body))) == 1


def test_two_parallel_layers_summed_with_a_partial_last_batch() -> None:
    """tf-keras's model of two parallel synchronized layers: as one process, batch by batch."""

    def world(world_size: int) -> list[bytes]:
        def body(rank: SimulatedRank) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
            pair = [
                BatchNormalization(synchronized=True, name=f"bn{i}", collective=rank, momentum=0.8) for i in range(2)
            ]
            out = []
            for step, rows in enumerate((16, 16, 5)):
                x = draw("mean-1e4", 3, step, (rows, 3), "float32")
                shard = np.array_split(x, world_size)[rank.rank]
                out.append(pair[0](shard, training=True) + pair[1](shard * 2, training=True))
                out.append(pair[1].backward(shard) + pair[0].backward(shard))
            return out

        ranks = run_all(Meeting(world_size), body)
        return [np.concatenate([r[i] for r in ranks]).tobytes() for i in range(6)]

    assert world(3) == world(1)
