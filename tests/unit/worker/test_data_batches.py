"""Which rows a step takes, and which rank reads them: pure functions of sizes and numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnworker.train.data import LAST_BATCHES, DataError, LastBatch
from bnworker.train.data.batches import (
    ROWS_AT_MOST,
    EpochSteps,
    shares,
    shuffled,
    split,
    taken,
)
from bnworker.train.data.ownership import Piece, pieces

SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(sum)


@given(SIZES, st.integers(1, 40), st.sampled_from(LAST_BATCHES))
def test_every_row_once(sizes: list[int], batch_size: int, last_batch: LastBatch) -> None:
    """Whatever the shards: each step has the rows that it should have, and no shard gives one back."""
    rows_m = np.array(sizes)
    if last_batch == "drop" and sum(sizes) < batch_size:
        return
    steps = EpochSteps(sum(sizes), batch_size, last_batch)
    ends = [steps.first(step) for step in range(steps.count + 1)]
    given_m = np.array([taken(rows_m, end) for end in ends])
    assert given_m.sum(axis=1).tolist() == ends
    assert (np.diff(given_m, axis=0) >= 0).all()
    assert given_m[0].tolist() == [0] * len(sizes)
    if last_batch != "drop":
        assert given_m[-1].tolist() == sizes


@given(st.integers(1, 10**18), st.integers(1, 10**6))
def test_the_rows_of_an_epoch_are_spread_evenly(rows: int, batch_size: int) -> None:
    """Sizes differ by one at most, none is above the batch size, and there are no more steps than need be."""
    steps = EpochSteps(rows, batch_size)
    looked_at = (0, 1, steps.count // 2, steps.count - 2, steps.count - 1)
    sizes = {steps.size(step) for step in looked_at if 0 <= step < steps.count}
    assert sizes <= {steps.smallest, steps.largest}
    assert steps.largest - steps.smallest <= 1
    assert 1 <= steps.smallest <= steps.largest <= batch_size
    assert (steps.first(0), steps.first(steps.count), steps.left_out) == (0, rows, 0)
    assert (steps.count - 1) * batch_size < rows


@pytest.mark.parametrize(
    ("rows", "batch_size", "spread", "keep", "drop"),
    [
        (10, 4, [3, 3, 4], [4, 4, 2], [4, 4]),
        (9, 4, [3, 3, 3], [4, 4, 1], [4, 4]),
        (8, 4, [4, 4], [4, 4], [4, 4]),
        (3, 2, [1, 2], [2, 1], [2]),
        (3, 1, [1, 1, 1], [1, 1, 1], [1, 1, 1]),
        (3, 7, [3], [3], None),
        (1, 1, [1], [1], [1]),
    ],
)
def test_the_sizes_of_an_epoch(
    rows: int, batch_size: int, spread: list[int], keep: list[int], drop: list[int] | None
) -> None:
    """By hand; the smallest and the largest are what a plan shows."""
    sizes_by_name = {}
    for last_batch, sizes in (("spread", spread), ("keep", keep), ("drop", drop)):
        if sizes is not None:
            steps = EpochSteps(rows, batch_size, last_batch)  # type: ignore[arg-type]  # one of the three
            sizes_by_name[last_batch] = [steps.size(step) for step in range(steps.count)]
            assert (steps.smallest, steps.largest) == (min(sizes), max(sizes))
            assert steps.left_out == rows - sum(sizes)
    assert sizes_by_name == {
        name: sizes for name, sizes in (("spread", spread), ("keep", keep), ("drop", drop)) if sizes
    }


def test_no_step_is_left() -> None:
    """Rows that do not fill one batch, all dropped."""
    with pytest.raises(DataError) as raised:
        EpochSteps(30, 64, "drop")
    assert str(raised.value) == (
        "--last-batch drop: the 30 rows to train on are fewer than --batch-size 64, which leaves no step: expected "
        "spread or keep, or a smaller batch size."
    )


def test_one_shard_gives_what_is_asked_for() -> None:
    """A single file is read in plain batches."""
    assert [taken(np.array([10]), end).tolist() for end in (0, 4, 8, 12)] == [[0], [4], [8], [10]]


def test_equal_shards_do_not_give_all_at_once() -> None:
    """A hundred shards and 64 rows a step: each quarter of the shards gives about 16 of them, at every step."""
    rows_m = np.full(100, 1000)
    steps = np.diff([taken(rows_m, 64 * step) for step in range(200)], axis=0)
    assert set(steps.sum(axis=1).tolist()) == {64}
    quarters = steps.reshape(-1, 4, 25).sum(axis=2)
    assert quarters.min() >= 14
    assert quarters.max() <= 18


def test_the_greatest_number_of_rows() -> None:
    """Products of rows stay within int64."""
    rows_m = np.array([ROWS_AT_MOST // 2, ROWS_AT_MOST - ROWS_AT_MOST // 2 - 5, 5])
    before_m, after_m = (taken(rows_m, end) for end in (ROWS_AT_MOST - 7, ROWS_AT_MOST - 3))
    assert (after_m - before_m).sum() == 4
    assert (before_m >= 0).all() and (after_m <= rows_m).all()


def test_the_order_depends_on_seed_epoch_and_shard() -> None:
    """The same arguments give the same order; any other one another."""
    orders = [shuffled(50, *what).tolist() for what in ((3, 2, 1), (3, 2, 1), (4, 2, 1), (3, 3, 1), (3, 2, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 4
    assert sorted(orders[0]) == list(range(50))


@given(SIZES, st.sampled_from([0.0, 0.1, 0.2, 1 / 3, 0.5, 0.99]))
def test_shares_add_up(sizes: list[int], share: float) -> None:
    """The share of all rows, to the nearest, however small the shards are."""
    drawn = shares(share, np.array(sizes))
    assert drawn.sum() == np.floor(share * sum(sizes) + 0.5)
    assert (drawn >= 0).all() and (drawn <= sizes).all()


def test_the_split_is_disjoint_and_complete() -> None:
    """Each row is in one of the three sets; those that are read in order ascend."""
    trained, validating, tested = split(40, 2, tests=8, validations=5)
    assert (len(trained), len(validating), len(tested)) == (27, 5, 8)
    assert sorted([*trained, *validating, *tested]) == list(range(40))
    assert validating.tolist() == sorted(validating) and tested.tolist() == sorted(tested)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.integers(1, 12), st.integers(0, 50))
def test_every_row_has_one_owner(sizes: list[int], world_size: int, count: int) -> None:
    """Of any set of rows of a shard; owners are contiguous, and whole shards stay whole."""
    owned = [pieces(sizes, rank, world_size) for rank in range(world_size)]
    for shard in range(len(sizes)):
        slices = [piece.of(count) for rank in owned for piece in rank if piece.shard == shard]
        assert [row for part in slices for row in range(count)[part]] == list(range(count))
    if len(sizes) >= world_size:
        assert all((piece.start, piece.stop, piece.denominator) == (0, 1, 1) for rank in owned for piece in rank)
    order = [piece.shard for rank in owned for piece in rank]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("sizes", "world_size", "expected"),
    [
        ([10, 10, 10, 10], 2, [[0, 1], [2, 3]]),
        ([10, 10, 10, 30], 2, [[0, 1, 2], [3]]),
        ([30, 10, 10, 10], 3, [[0], [1], [2, 3]]),
        ([100, 1, 1], 3, [[], [0], [1, 2]]),
    ],
)
def test_undivided_shards_go_to_the_rank_of_their_middle(
    sizes: list[int], world_size: int, expected: list[list[int]]
) -> None:
    """Balanced by bytes; a rank may have nothing."""
    assert [[piece.shard for piece in pieces(sizes, rank, world_size)] for rank in range(world_size)] == expected


def test_more_ranks_than_shards() -> None:
    """All bytes are cut into equal parts: each rank reads of the shards that its part covers."""
    assert pieces([6, 3], 0, 3) == (Piece(0, 0, 9, 18),)
    assert pieces([6, 3], 1, 3) == (Piece(0, 9, 18, 18),)
    assert pieces([6, 3], 2, 3) == (Piece(1, 0, 9, 9),)
    assert [piece.of(7) for rank in range(4) for piece in pieces([5], rank, 4)] == [
        slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 7),
    ]  # fmt: skip
