"""Plain reductions: exact integers, floats in rank order, maxima without an order."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bnlayer.reduction import (
    FLOATS,
    INTEGERS,
    OPS,
    combined,
    decode,
    dtype_named,
    encode,
    reduce_in_rank_order,
    refusal,
)

Ranks = list[list[NDArray[Any]]]


@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS, "bool"])
@pytest.mark.parametrize("op", OPS)
def test_every_dtype_keeps_its_dtype_and_shape(name: str, op: str) -> None:
    """The result has the dtype and shape of what came in, and the value that NumPy finds."""
    dtype = dtype_named(name)
    if name == "bool" and op == "sum":
        assert refusal(op, dtype) == (
            "received bool for op='sum': a sum of truths is a count; cast to an integer dtype first"
        )
        return
    assert refusal(op, dtype) is None
    ranks: Ranks = [[(np.arange(6).reshape(2, 3) * k % 5).astype(dtype), np.zeros((0, 2), dtype)] for k in (1, 2, 3)]
    full, empty = reduce_in_rank_order(op, ranks)
    assert full.dtype == empty.dtype == dtype
    assert empty.shape == (0, 2)
    wide = np.stack([rank[0].astype(np.float64) for rank in ranks])
    want = wide.sum(0) if op == "sum" else wide.max(0) if op == "max" else wide.min(0)
    assert (full == want.astype(dtype)).all()


@given(
    name=st.sampled_from(INTEGERS),
    op=st.sampled_from(OPS),
    shares=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
)
def test_integers_are_exact_or_an_overflow(name: str, op: str, shares: list[int]) -> None:
    """Against Python's integers, over the whole range of each dtype."""
    dtype = dtype_named(name)
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    values = [low + share % (high - low + 1) for share in shares]
    ranks: Ranks = [[np.array([value], dtype)] for value in values]
    want = sum(values) if op == "sum" else max(values) if op == "max" else min(values)
    if low <= want <= high:
        assert int(reduce_in_rank_order(op, ranks)[0][0]) == want
    else:
        with pytest.raises(OverflowError, match=f"the sum over the ranks is {want}, and {name} holds {low} to {high}"):
            reduce_in_rank_order(op, ranks)


def test_overflow_names_array_element_and_range() -> None:
    """The first element that does not fit."""
    fits, bursts = np.zeros(3, np.int8), np.array([[1, 2], [100, 127]], np.int8)
    with pytest.raises(OverflowError) as caught:
        reduce_in_rank_order("sum", [[fits, bursts], [fits, bursts]])
    assert str(caught.value) == (
        "allreduce(op='sum'): array 1, element 2: the sum over the ranks is 200, and int8 holds -128 to 127. "
        "Sum in a wider dtype."
    )


def test_partial_sums_may_leave_the_range() -> None:
    """Only the total must fit: int8 100 + 100 − 100 is 100."""
    ranks: Ranks = [[np.array([v], np.int8)] for v in (100, 100, -100)]
    assert reduce_in_rank_order("sum", ranks)[0].tolist() == [100]


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_added_in_float64_and_rounded_once(name: str) -> None:
    """In the ranks' order, and with the bits of exactly that."""
    dtype = dtype_named(name)
    rng = np.random.default_rng(0)
    ranks: Ranks = [[(rng.standard_normal(500) * 10.0**k).astype(dtype)] for k in (0, 2, 4, 1)]
    wide = [rank[0].astype(np.float64) for rank in ranks]
    want = (((wide[0] + wide[1]) + wide[2]) + wide[3]).astype(dtype)
    assert reduce_in_rank_order("sum", ranks)[0].tobytes() == want.tobytes()


def test_the_order_of_ranks_can_be_seen_in_float_sums() -> None:
    """What rank order fixes: another order gives other bits."""
    a, b, c = np.array([1e16]), np.array([1.0]), np.array([-1e16])
    assert reduce_in_rank_order("sum", [[a], [b], [c]])[0].tolist() == [0.0]
    assert reduce_in_rank_order("sum", [[a], [c], [b]])[0].tolist() == [1.0]


@pytest.mark.parametrize("name", FLOATS)
def test_nan_wins_and_zeros_have_an_order(name: str) -> None:
    """In every order of the ranks, with the same bits."""
    dtype = dtype_named(name)
    values = np.array([[np.nan, np.inf, 0.0, 1.0], [1.0, -np.inf, -0.0, 2.0], [-np.inf, 3.0, 0.0, -np.nan]])
    for order in itertools.permutations(range(3)):
        ranks: Ranks = [[values[i].astype(dtype)] for i in order]
        greatest, least = (reduce_in_rank_order(op, ranks)[0].astype(np.float64) for op in ("max", "min"))
        assert np.array_equal(greatest, [np.nan, np.inf, 0.0, np.nan], equal_nan=True)
        assert np.array_equal(least, [np.nan, -np.inf, -0.0, np.nan], equal_nan=True)
        assert not np.signbit(greatest[2])
        assert np.signbit(least[2])
        assert np.isnan(reduce_in_rank_order("sum", ranks)[0].astype(np.float64)).tolist() == [True, True, False, True]


def test_one_rank_gets_new_arrays() -> None:
    """A world of one copies, as every other does."""
    x = np.arange(3.0)
    (got,) = reduce_in_rank_order("sum", [[x]])
    assert got.tobytes() == x.tobytes()
    assert not np.shares_memory(got, x)


@pytest.mark.parametrize("op", OPS)
def test_limbs_have_no_order(op: str) -> None:
    """Integer sums, and all maxima and minima, may be combined in any grouping: what an MPI library does."""
    rng = np.random.default_rng(1)
    ranks: Ranks = [[rng.integers(-9, 9, 5), rng.integers(0, 9, 4).astype(np.uint64)] for _ in range(4)]
    encoded = [encode(op, rank) for rank in ranks]
    left = combined(op, combined(op, combined(op, encoded[0], encoded[1]), encoded[2]), encoded[3])
    tree = combined(op, combined(op, encoded[3], encoded[1]), combined(op, encoded[2], encoded[0]))
    for a, b in zip(decode(op, left, ranks[0]), decode(op, tree, ranks[0]), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("dtype", "name"), [("O", "object"), ("U1", "str32"), ("c16", "complex128"), ("M8[s]", "datetime64[s]")]
)
def test_what_can_not_be_reduced_is_named(dtype: str, name: str) -> None:
    """The refusal lists what is accepted."""
    why = refusal("max", np.dtype(dtype))
    assert why is not None
    assert why.startswith("expected one of float16, bfloat16, float32, float64, int8")
    assert why.endswith(f"or bool for max and min; received {name}")
    with pytest.raises(TypeError, match="received 'float8'"):
        dtype_named("float8")
