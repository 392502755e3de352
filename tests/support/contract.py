"""What every transport must do, as bodies that one rank runs: alone, as a thread, or as a process under mpiexec.

A body gets this rank's world and asserts on what this rank sees. What it returns must be equal on every rank: the
runner compares it, so that "the same bits" and "the same text" are checked across ranks too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import BatchNormalization, CollectiveError
from bnlayer.collective import Call, Direction, LayerTerms, Operation, Place
from bnlayer.kernels import kernels
from bnlayer.reduction import FLOATS, INTEGERS, dtype_named, reduce_in_rank_order
from bnlayer.view import View
from bnworker import World


@dataclass(frozen=True)
class Body:
    """One test body.

    Attributes:
        run: what each rank does.
        sizes: the numbers of ranks it is for.
        transports: those it is for.
    """

    run: Callable[[World], object]
    sizes: tuple[int, ...] = (1, 2, 3)
    transports: tuple[str, ...] = ("alone", "mpi", "service")

    def runs_in(self, transport: str, world_size: int) -> bool:
        """Whether it is for such a world."""
        return transport in self.transports and world_size in self.sizes


BODIES: dict[str, Body] = {}


def body(
    sizes: tuple[int, ...] = (1, 2, 3), transports: tuple[str, ...] = ("alone", "mpi", "service")
) -> Callable[[Callable[[World], object]], Callable[[World], object]]:
    """Put a function into the contract."""

    def register(run: Callable[[World], object]) -> Callable[[World], object]:
        BODIES[run.__name__] = Body(run, sizes, transports)
        return run

    return register


def names(transport: str, world_size: int) -> list[str]:
    """The bodies for such a world."""
    return [name for name, one in BODIES.items() if one.runs_in(transport, world_size)]


def of_rank(rank: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Data of one rank that sum without rounding or overflow."""
    return (np.arange(6).reshape(2, 3) * (rank + 1) % 7).astype(dtype)


def each_rank(world: World, make: Callable[[int], NDArray[Any]]) -> list[NDArray[Any]]:
    """What every rank contributes, by rank."""
    return [make(rank) for rank in range(world.world_size)]


def told(array: NDArray[Any]) -> list[str]:
    """An array as something to compare across ranks."""
    return [array.dtype.name, str(array.shape), array.tobytes().hex()]


# ---- who am I ----


@body()
def knows_itself(world: World) -> object:
    """Rank, number of ranks and transport."""
    assert 0 <= world.rank < world.world_size
    expected = f"World(rank={world.rank}, world_size={world.world_size}, transport={world.transport!r})"
    assert repr(world) == expected
    return [world.world_size, world.transport]


@body()
def shards_cover_all_rows_once(world: World) -> object:
    """The slices of all ranks lie end to end; the first n mod W hold one row more."""
    for n in (0, 1, 2, 3, 7, 100):
        mine = np.zeros(n, np.int64)
        mine[world.shard(n)] = 1
        (total,) = world.allreduce([mine])
        assert (total == 1).all()
        (sizes,) = world.allreduce([np.eye(world.world_size, dtype=np.int64)[world.rank] * int(mine.sum())])
        each, more = divmod(n, world.world_size)
        assert sizes.tolist() == [each + (rank < more) for rank in range(world.world_size)]
    return None


# ---- allreduce ----


@body()
def sums_keep_dtype_and_shape(world: World) -> object:
    """Every accepted dtype, several arrays of several dtypes in one call."""
    dtypes = [dtype_named(name) for name in (*FLOATS, *INTEGERS)]
    got = world.allreduce([of_rank(world.rank, dtype) for dtype in dtypes])
    for dtype, array in zip(dtypes, got, strict=True):
        ranks = [of_rank(rank, dtype).astype(np.float64) for rank in range(world.world_size)]
        assert array.dtype == dtype
        assert (array == np.sum(ranks, 0).astype(dtype)).all()
    return [told(array) for array in got]


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
        seen += [told(greatest), told(least)]
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
def overflow_is_told_to_every_rank(world: World) -> object:
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


@body()
def float_sums_have_the_order_of_the_ranks(world: World) -> object:
    """The bits of the service, and of MPI when deterministic, are those of adding in rank order."""
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


# ---- broadcast and barrier ----


@body()
def broadcast_brings_dtype_and_shape_along(world: World) -> object:
    """From each rank in turn; the others need not know what comes."""
    seen = []
    for root in range(world.world_size):
        arrays = [of_rank(root, dtype_named(name)) for name in (*FLOATS, *INTEGERS, "bool")]
        arrays += [np.zeros((0, 2), np.float32), np.array(7, np.int16)]
        got = world.broadcast(arrays if world.rank == root else None, root=root)
        assert [told(array) for array in got] == [told(array) for array in arrays]
        assert all(a.flags.writeable and not np.shares_memory(a, b) for a, b in zip(got, arrays, strict=True) if a.size)
        seen.append([told(array) for array in got])
    assert world.broadcast([], root=0) == []
    return seen


@body()
def broadcast_needs_a_root_that_exists(world: World) -> object:
    """A root that is no rank is refused before anything is sent."""
    for root in (-1, world.world_size):
        with pytest.raises(ValueError) as caught:
            world.broadcast([1.0], root=root)
        assert str(caught.value) == (f"broadcast(root=): expected 0 <= root < {world.world_size}, received {root}.")
    world.barrier()
    return None


@body()
def barriers_repeat(world: World) -> object:
    """Many barriers in a row."""
    for _ in range(20):
        world.barrier()
    return world.statistics.exchanges[None, None, Operation.BARRIER]


@body()
def statistics_count_what_was_exchanged(world: World) -> object:
    """Exchanges by kind, bytes of data, time spent waiting."""
    world.allreduce([np.zeros(4, np.float32)])
    world.broadcast([np.zeros(2)] if world.rank == 0 else None)
    statistics = world.statistics
    assert statistics.exchanges == {(None, None, Operation.REDUCE): 1, (None, None, Operation.BROADCAST): 1}
    assert statistics.bytes_sent == (32 if world.rank == 0 else 16)
    assert statistics.bytes_received == 32
    assert statistics.waiting_seconds >= 0
    return None


# ---- the layer's door ----


def rows_of(rank: int, rows: int = 8, channels: int = 4) -> NDArray[np.float32]:
    """One rank's batch."""
    return np.random.default_rng(rank).standard_normal((rows, channels)).astype(np.float32) + np.float32(10 * rank)


@body()
def enrolment_seeds_from_rank_0(world: World) -> object:
    """The others' initial moving statistics are replaced by rank 0's."""
    bn = BatchNormalization(name="bn", synchronized=True, momentum=1.0, collective=world)
    bn.build((None, 4))
    bn.moving_mean.assign(np.full(4, 100.0 + world.rank, np.float32))
    bn(rows_of(world.rank), training=True)
    assert bn.moving_mean.value.tolist() == [100.0] * 4
    return told(bn.moving_mean.value)


@body()
def probes_and_sums_are_exact(world: World) -> object:
    """A probe is the MAX of every rank's words, sums are the SUM, bit for bit."""
    terms = LayerTerms(4, "float32", 0.99, 1e-3)
    bn = BatchNormalization(name="bn", synchronized=True)
    bn.build((None, 4))
    world.enroll(Call(Operation.ENROLL, Place("bn", None, 0), terms), bn.state)
    views = [View.of(rows_of(rank), 1, None) for rank in range(world.world_size)]
    grid = bn.state.forward
    probes = [kernels().probe(view.x, None, grid) for view in views]
    place = Place("bn", Direction.FORWARD, 0)
    sent = probes[world.rank].copy()
    got = world.exchange(Call(Operation.PROBE, place, terms), sent).words
    assert np.array_equal(got, np.max(probes, 0))
    assert np.array_equal(sent, probes[world.rank])
    grid = grid.probed(got, np.ones(4, bool))
    sums = [kernels().moments(view.x, None, grid).words for view in views]
    agreed = LayerTerms(4, "float32", 0.99, 1e-3, grid=grid.fingerprint)
    total = world.exchange(Call(Operation.SUMS, place, agreed, 1), sums[world.rank])
    assert np.array_equal(total.words, np.sum(sums, 0))
    return told(total.words)


@body()
def layers_agree_in_outputs_and_gradients(world: World) -> object:
    """Every rank holds the union's statistics and gradients after a step."""
    bn = BatchNormalization(name="bn", synchronized=True, collective=world)
    union = np.concatenate([rows_of(rank) for rank in range(world.world_size)])
    mine = slice(8 * world.rank, 8 * world.rank + 8)
    alone = BatchNormalization(name="bn")
    want_y, want_dx = alone(union, training=True), alone.backward(union)
    y, dx = bn(union[mine], training=True), bn.backward(union[mine])
    assert y.tobytes() == want_y[mine].tobytes()
    assert dx.tobytes() == want_dx[mine].tobytes()
    assert bn.gamma is not None
    assert bn.gamma.gradient is not None
    return [told(bn.moving_mean.value), told(bn.moving_variance.value), told(bn.gamma.gradient)]


@body(transports=("alone", "mpi"))
def pull_does_nothing_where_each_rank_owns_its_own(world: World) -> object:
    """Not even a layer that is not built is looked at."""
    assert world.pull(BatchNormalization(name="bn")) is None
    return None


@body()
def an_unbuilt_layer_can_not_be_pushed(world: World) -> object:
    """It has no statistics yet."""
    with pytest.raises(ValueError, match=r"^Layer 'bn' has no state yet"):
        world.push(BatchNormalization(name="bn"))
    return None


@body()
def what_all_push_is_trained_on(world: World) -> object:
    """After the same push on every rank, training starts from the pushed statistics everywhere."""
    bn = BatchNormalization(name="bn", synchronized=True, momentum=1.0, collective=world)
    bn(rows_of(world.rank), training=True)
    world.barrier()
    bn.moving_mean.assign(np.full(4, 7.0, np.float32))
    world.push(bn)
    world.barrier()
    world.pull(bn)
    bn(rows_of(world.rank), training=True)
    assert bn.moving_mean.value.tolist() == [7.0] * 4
    return told(bn.moving_mean.value)


# ---- the end ----


@body()
def a_world_that_was_left_says_so(world: World) -> object:
    """Leaving twice is nothing; exchanging afterwards is an error."""
    world.leave()
    world.leave()
    with pytest.raises(RuntimeError) as caught:
        world.barrier()
    assert not isinstance(caught.value, CollectiveError)
    assert str(caught.value) == f"{world!r}: this world was left; make exchanges inside `with bnworker.join()`."
    assert repr(world).endswith(", left)")
    return None
