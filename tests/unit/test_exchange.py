"""What is asked next: probes when needed, at most one an exchange, and alike on every rank."""

from __future__ import annotations

import numpy as np
import pytest

from bnlayer import BatchNormalization, MismatchError, StallError
from bnlayer.collective import Call, Operation
from support.families import draw
from support.ranks import Meeting, SimulatedRank, run_all, run_ranks


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
    """200 steps of normal data: one enrolment, at most two probes, then sums alone, numbered without a gap."""
    calls = exchanges("normal", 200, dtype=dtype)
    assert count(calls, Operation.ENROLL) == 1
    assert count(calls, Operation.PROBE) <= 3
    sums = [call for call in calls if call.operation is Operation.SUMS]
    assert len(sums) <= 402
    for direction in ("forward", "backward"):
        steps = [call.key.step for call in sums if call.key.direction == direction]
        assert sorted(set(steps)) == list(range(200))


def test_a_jump_of_scale_costs_one_probe_each_way() -> None:
    """Up: a value falls outside the window. Down: the window has become too coarse. Both regrid within the exchange."""
    calls = exchanges("jump", 5)
    forward = [(call.operation, call.key.step, call.attempt) for call in calls if call.key.direction == "forward"]
    again = [(Operation.SUMS, 0), (Operation.PROBE, 1), (Operation.SUMS, 2)]
    assert forward[:2] == [(Operation.PROBE, 0, 0), (Operation.SUMS, 0, 1)]
    jumps = [(op, step, attempt) for step in (1, 2) for op, attempt in again]
    # From 1 to 1e-6 and back the spread stays below epsilon, which the window need not resolve.
    assert forward[2:] == [*jumps, (Operation.SUMS, 3, 0), (Operation.SUMS, 4, 0)]


def test_constant_data_asks_for_no_second_probe() -> None:
    """A channel without a range has no window that could be too coarse; each new constant misfits once."""
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


def disagree(**arguments: object) -> list[Exception]:
    """What two ranks are told when rank 1's layer is made with other arguments."""

    def body(rank: SimulatedRank) -> None:
        mine = arguments if rank.rank else {}
        bn = BatchNormalization(synchronized=True, name="bn", collective=rank, **mine)  # type: ignore[arg-type]
        bn(np.ones((2, 2)), training=True)

    return [error for error in run_ranks(Meeting(2), body) if isinstance(error, Exception)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"momentum": 0.5}, "momentum: rank 0 sent 0.99, rank 1 sent 0.5"),
        ({"epsilon": 0.5}, "epsilon: rank 0 sent 0.001, rank 1 sent 0.5"),
        ({"dtype": "float64"}, "dtype: rank 0 sent float32, rank 1 sent float64"),
    ],
)
def test_different_configurations_are_told_apart_by_name(arguments: dict[str, object], text: str) -> None:
    """mmengine #1624: ranks that disagree must not wait for a time-out."""
    errors = disagree(**arguments)
    assert [type(error) for error in errors] == [MismatchError, MismatchError]
    assert text in str(errors[0])
    assert str(errors[0]) == str(errors[1])


def test_a_mask_on_one_rank_is_a_mismatch() -> None:
    """e = 1e-7 on some ranks alone would be silently wrong; the grid is compared too."""

    def body(rank: SimulatedRank) -> None:
        bn = BatchNormalization(synchronized=True, name="bn", collective=rank)
        bn(np.ones((2, 2)), training=True)
        bn(np.ones((2, 2)), training=True, mask=np.ones(2) if rank.rank == 1 else None)

    errors = run_ranks(Meeting(3), body)
    for error in errors:
        assert isinstance(error, MismatchError)
        assert str(error) == (
            "layer 'bn' (forward, step 1): masked: rank 1 sent True, ranks 0, 2 sent False. All ranks must build the "
            "same model and make the same calls; check the configuration of rank 1."
        )
        assert (error.ranks, error.layer, error.step) == ((1,), "bn", 1)


def test_a_restored_grid_on_one_rank_is_a_mismatch() -> None:
    """Words of different grids must never be added."""

    def body(rank: SimulatedRank) -> None:
        bn = BatchNormalization(synchronized=True, name="bn", collective=rank)
        bn(np.array([[1.0], [2.0]]), training=True)
        if rank.rank == 1:
            alone = BatchNormalization()
            alone(np.array([[100.0], [-100.0]]), training=True)
            bn.restore(alone.state)
        bn(np.array([[1.0], [2.0]]), training=True)

    errors = run_ranks(Meeting(2), body)
    assert all(
        isinstance(error, MismatchError) and "grids were set on rank 1, but not on rank 0" in str(error)
        for error in errors
    )


def test_layers_in_another_order_stall_by_name() -> None:
    """pytorch #44957, horovod #2241: a silent hang."""

    def body(rank: SimulatedRank) -> None:
        layers = [BatchNormalization(synchronized=True, name=name, collective=rank) for name in "ab"]
        for bn in layers if rank.rank == 0 else layers[::-1]:
            bn(np.ones((2, 2)), training=True)

    errors = run_ranks(Meeting(2), body)
    for error, layer in zip(errors, "ab", strict=True):
        assert isinstance(error, StallError)
        assert str(error).startswith(
            "The ranks wait for each other: rank 0 waits in the enrolment of layer 'a'; "
            "rank 1 waits in the enrolment of layer 'b'."
        )
        assert (error.ranks, error.layer, error.step) == ((0, 1), layer, 0)


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
