"""Reductions of arrays: dtypes, odd values, overflow, refusals, order."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from bnlayer.reduction import FLOATS, INTEGERS, dtype_named, reduce_in_rank_order
from bnworker import World
from support.contract.registry import as_text, body, of_rank


@body()
def sums_keep_dtype_and_shape(world: World) -> object:
    """Every accepted dtype, several arrays of several dtypes in one call."""
    dtypes = [dtype_named(name) for name in (*FLOATS, *INTEGERS)]
    got = world.allreduce([of_rank(world.rank, dtype) for dtype in dtypes])
    for dtype, array in zip(dtypes, got, strict=True):
        ranks = [of_rank(rank, dtype).astype(np.float64) for rank in range(world.world_size)]
        assert array.dtype == dtype
        assert (array == np.sum(ranks, 0).astype(dtype)).all()
    return [as_text(array) for array in got]


@body()
def maxima_and_minima_keep_dtype_and_shape(world: World) -> object:
    """Every accepted dtype and bool, with numbers below zero where there are such."""
    seen = []
    for name in (*FLOATS, *INTEGERS, "bool"):
        dtype = dtype_named(name)
        signed = name == "bool" or name.startswith("uint")
        arrays = [of_rank(r, np.dtype(np.int8)) - (0 if signed else 3) for r in range(world.world_size)]
        mine = arrays[world.rank].astype(dtype)
        (greatest,) = world.allreduce([mine], op="max")
        (least,) = world.allreduce([mine], op="min")
        assert greatest.dtype == least.dtype == dtype
        assert (greatest == np.max([a.astype(dtype).astype(np.float64) for a in arrays], 0).astype(dtype)).all()
        assert (least == np.min([a.astype(dtype).astype(np.float64) for a in arrays], 0).astype(dtype)).all()
        seen += [as_text(greatest), as_text(least)]
    return seen


@body()
def largest_integers_are_exact(world: World) -> object:
    """Integers beyond 2^53 are not taken through a float."""
    big, small = 2**64 - 1, -(2**63)
    last = world.world_size - 1
    u = np.array([big if world.rank == last else 0, 3], np.uint64)
    i = np.array([small if world.rank == last else 0, -3], np.int64)
    total_u, total_i = world.allreduce([u, i])
    assert total_u.tolist() == [big, 3 * world.world_size]
    assert total_i.tolist() == [small, -3 * world.world_size]
    assert world.allreduce([u], op="max")[0].tolist() == [big, 3]
    assert world.allreduce([i], op="min")[0].tolist() == [small, -3]
    return None


@body()
def nan_and_inf_pass_through(world: World) -> object:
    """A NaN of one rank is the sum, the maximum and the minimum; Inf behaves as in IEEE arithmetic."""
    last = world.world_size - 1
    for name in FLOATS:
        dtype = dtype_named(name)
        odd = np.array([np.nan, np.inf, -np.inf, -np.nan, 2.0]).astype(dtype)
        plain = np.array([1.0, 1.0, 1.0, 1.0, -0.0]).astype(dtype)
        mine = odd if world.rank == last else plain
        total, greatest, least = (world.allreduce([mine], op=op)[0].astype(np.float64) for op in ("sum", "max", "min"))
        alone = world.world_size == 1
        assert np.array_equal(total, [np.nan, np.inf, -np.inf, np.nan, 2.0], equal_nan=True)
        assert np.array_equal(greatest, [np.nan, np.inf, -np.inf if alone else 1.0, np.nan, 2.0], equal_nan=True)
        assert np.array_equal(least, [np.nan, np.inf if alone else 1.0, -np.inf, np.nan, 2.0 if alone else 0.0], True)
    both = np.array([np.inf if world.rank == 0 else -np.inf])
    assert np.isnan(world.allreduce([both])[0][0]) == (world.world_size > 1)
    return None


@body()
def zeros_have_an_order(world: World) -> object:
    """−0 < +0 on every transport, whichever rank holds which."""
    for negative in range(world.world_size):
        mine = np.array([-0.0 if world.rank == negative else 0.0], np.float32)
        greatest, least = world.allreduce([mine], op="max")[0], world.allreduce([mine], op="min")[0]
        assert bool(np.signbit(greatest[0])) == (world.world_size == 1)
        assert bool(np.signbit(least[0]))
    return None


@body()
def narrow_floats_are_rounded_once(world: World) -> object:
    """float16 sums in float64: no rounding and no overflow on the way."""
    values = [60000.0, 60000.0, -60000.0]
    mine = np.array([values[world.rank], 2048.0 if world.rank == 0 else 1.0], np.float16)
    got = world.allreduce([mine])[0].astype(np.float64).tolist()
    assert got == {1: [60000.0, 2048.0], 2: [np.inf, 2048.0], 3: [60000.0, 2050.0]}[world.world_size]
    return None


@body()
def nothing_is_reduced_to_nothing(world: World) -> object:
    """An empty list, arrays without elements, arrays without axes, plain numbers."""
    assert world.allreduce([]) == []
    empty, scalar, number = world.allreduce([np.zeros((0, 3), np.int8), np.array(2.0), 3])
    assert empty.shape == (0, 3)
    assert empty.dtype == np.int8
    assert (scalar.shape, float(scalar)) == ((), 2.0 * world.world_size)
    assert (number.shape, int(number)) == ((), 3 * world.world_size)
    return None


@body()
def any_memory_layout_is_taken(world: World) -> object:
    """Strided, transposed, reversed, read-only and foreign-endian arrays; the arguments stay as they were."""
    base = np.arange(24, dtype=np.float32).reshape(4, 6) * (world.rank + 1)
    given = [base[::2, ::-1], base.T, base.astype(">f8"), np.broadcast_to(base[0], (3, 6))]
    before = [array.tobytes() for array in given]
    got = world.allreduce(given)
    factor = sum(range(1, world.world_size + 1)) / (world.rank + 1)
    for array, reduced in zip(given, got, strict=True):
        assert np.array_equal(reduced, array * factor)
        assert reduced.dtype == array.dtype.newbyteorder("=")
        assert reduced.flags.writeable
        assert not np.shares_memory(reduced, array)
    assert [array.tobytes() for array in given] == before
    return None


@body()
def overflow_is_reported_to_every_rank(world: World) -> object:
    """A sum that its dtype can't hold raises everywhere with the same text; the world goes on."""
    seen = []
    for name in INTEGERS:
        dtype = dtype_named(name)
        most = int(np.iinfo(dtype).max)
        arrays = [np.zeros(2, dtype), np.array([1, most if world.rank == 0 else 0], dtype)]
        if world.world_size > 1:
            arrays[1][1] += dtype.type(world.rank != 0)
            with pytest.raises(OverflowError) as caught:
                world.allreduce(arrays)
            seen.append(str(caught.value))
            assert str(caught.value) == (
                f"allreduce(op='sum'): array 1, element 1: the sum over the ranks is {most + world.world_size - 1}, "
                f"and {name} holds {np.iinfo(dtype).min} to {most}. Sum in a wider dtype."
            )
        else:
            assert world.allreduce(arrays)[1].tolist() == [1, most]
    world.barrier()
    return seen


@body()
def what_cannot_be_reduced_is_refused(world: World) -> object:
    """Refused on each rank before anything is sent; the world goes on."""
    accepted = (
        "expected one of float16, bfloat16, float32, float64, int8, int16, int32, int64, uint8, uint16, uint32, "
        "uint64, or bool for max and min; received "
    )
    for given, what in (
        (np.array([None]), "object"),
        (np.array(["a"]), "str32"),
        (np.array([1j]), "complex128"),
        (np.zeros(1, np.longdouble), "longdouble" if np.dtype(np.longdouble).name == "longdouble" else "float128"),
        (np.zeros(1, "M8[s]"), "datetime64[s]"),
        (np.zeros(1, ml_dtypes.float8_e5m2), "float8_e5m2"),
    ):
        with pytest.raises(TypeError) as caught:
            world.allreduce([1.0, given])
        assert str(caught.value) == f"allreduce(arrays): array 1: {accepted}{what}."
    with pytest.raises(TypeError) as caught:
        world.allreduce([np.array([True])])
    assert str(caught.value) == (
        "allreduce(arrays): array 0: received bool for op='sum': a sum of truths is a count; "
        "cast to an integer dtype first."
    )
    with pytest.raises(TypeError) as caught:
        world.allreduce(np.zeros(3))
    assert str(caught.value) == (
        "allreduce(arrays): expected a list of arrays, received one of dtype float64; write [x]."
    )
    with pytest.raises(ValueError, match=r"^allreduce\(op=\): expected one of sum, max, min, received 'mean'\.$"):
        world.allreduce([1.0], op="mean")  # type: ignore[arg-type]  # what is tested
    world.barrier()
    return None


@body(sizes=(1, 2, 3, 4))
def float_sums_have_the_order_of_the_ranks(world: World) -> object:
    """The bits of the service, and of MPI when deterministic, are those of adding in rank order.

    Of four ranks MPI's own sum is (0 + 1) + (2 + 3).
    """
    ranks = [np.random.default_rng(rank).standard_cauchy(1000) * 10.0 ** (5 * rank) for rank in range(world.world_size)]
    for dtype in (np.float64, np.float32):
        arrays = [array.astype(dtype) for array in ranks]
        (want,) = reduce_in_rank_order("sum", [[array] for array in arrays])
        (got,) = world.allreduce([arrays[world.rank]])
        assert got.tobytes() == want.tobytes()
    return None


@body()
def arrays_larger_than_a_message_arrive(world: World) -> object:
    """6 MiB of floats and of integers, reduced and broadcast."""
    floats = np.arange(3 * 2**18, dtype=np.float64) + world.rank
    (total,) = world.allreduce([floats])
    extra = sum(range(world.world_size))
    assert np.array_equal(total, np.arange(3 * 2**18) * world.world_size + extra)
    (integers,) = world.allreduce([np.full(3 * 2**18, world.rank, np.int64)])
    assert (integers == extra).all()
    root = world.world_size - 1
    (sent,) = world.broadcast([floats] if world.rank == root else None, root=root)
    assert np.array_equal(sent, np.arange(3 * 2**18, dtype=np.float64) + root)
    return None
