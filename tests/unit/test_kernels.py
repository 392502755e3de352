"""The compiled kernels beside the reference: the same bits, whatever the shape, the mask, or what is in the data."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bnlayer.dtypes import dtype_named, rounded
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import reference
from bnlayer.kernels.compiled import Compiled, variants
from bnlayer.layer import BatchNormalization
from bnlayer.limbs import as_ints, counted
from bnlayer.moments import Moments
from bnlayer.precision import precision_of

Array = NDArray[Any]

# (A, C, B): one channel, fewer than a vector holds, no multiple of it, three rows taken for one, runs shorter and
# longer than a fold, nothing.
SHAPES = (
    (100, 8, 1),
    (2500, 24, 1),
    (500, 3, 1),
    (13, 65, 1),
    (2101, 72, 1),
    (4, 2049, 1),
    (10_000, 1, 1),
    (3, 4, 49),
    (20, 5, 700),
    (1, 2, 40_000),
    (2, 3, 7),
    (1, 7, 1),
    (1, 1, 1),
    (0, 4, 1),
    (3, 2, 0),
    (3, 1, 0),
    (3, 0, 2),
)
DATA = ("normal", "not finite", "outside", "constant", "tiny", "grown", "grown late", "half units", "on both sides")
MASKS = ("none", "rows", "elements", "spread")


def every_set() -> list[Compiled]:
    """Every variant that this processor runs, and the widest by three threads."""
    return [*(Compiled(variant) for variant in variants()), Compiled(variants()[0], threads=3, worth=8)]


@pytest.fixture(params=every_set(), ids=[*variants(), "threads"])
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """Each of them."""
    kernels: Compiled = request.param
    return kernels


def same(got: Array, wanted: Array) -> None:
    """Bit for bit; but one NaN is as good as another."""
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    if got.dtype.kind in "fV":  # V: bfloat16
        nan, zero = np.isnan(wanted), got.dtype.type(0)
        assert (np.isnan(got) == nan).all()
        got, wanted = np.where(nan, zero, got), np.where(nan, zero, wanted)
    assert got.tobytes() == wanted.tobytes()


def masked(kind: str, shape: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.bool_] | None:
    """A mask of a kind, as a `View` makes it."""
    if kind == "none":
        return None
    if kind == "spread":  # each truth is that of several values side by side
        several = next((n for n in (7, 5, 3, 2) if shape[2] % n == 0), 1)
        return rng.random((*shape[:2], shape[2] // several)) < 0.6
    return rng.random((shape[0], 1, 1) if kind == "rows" and shape[2] == 1 else shape) < 0.6


def of_elements(mask: NDArray[np.bool_] | None, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """As the reference takes it: not spread."""
    if mask is None or mask.shape[:2] != shape[:2] or mask.shape[2] in (0, shape[2]):
        return mask
    return np.repeat(mask, shape[2] // mask.shape[2], axis=2)


def alike(
    compiled: Compiled, x: Array, dy: Array, mask: NDArray[np.bool_] | None, grid: Grid, rng: np.random.Generator
) -> None:
    """Compare every kernel on one batch; the reference has float16 and bfloat16 as float32, and rounds once."""
    channels, kind = x.shape[1], x.dtype
    wide_x, wide_dy = (v if v.dtype.itemsize > 2 else v.astype(np.float32) for v in (x, dy))
    wide, elements = wide_x.dtype, of_elements(mask, x.shape)
    same(compiled.probe(x, mask, grid), reference.probe(wide_x, elements, grid))
    limbs = reference.moments(wide_x, elements, grid)
    same(compiled.moments(x, mask, grid), limbs)
    statistics = Moments(limbs, grid).statistics(1e-3, mask is not None)
    mean, pivot, nonfinite = statistics.rounded_mean, statistics.pivot, statistics.nonfinite
    offset, slope, scale, shift = rng.normal(size=(4, channels)).astype(wide)
    of_channels: tuple[Array, ...] = mean, scale, shift, nonfinite
    same(compiled.normalize(x, *of_channels), rounded(reference.normalize(wide_x, *of_channels), kind))
    unknown = BackwardGrid.unknown(wide.name, channels).reaching(statistics.reach)
    reached = reference.gradient_probe(wide_dy, wide_x, pivot, unknown)
    same(compiled.gradient_probe(dy, x, pivot, unknown), reached)
    probed = unknown.probed(reached, np.ones(channels, bool))
    fits = mask is None and not nonfinite.any()
    for factor in (1, 150, 1e6, 1e-9):  # within the window, near its end, above it, far below it
        scaled = (wide_dy * factor).astype(kind)
        wanted = reference.gradient_sums(scaled.astype(wide), wide_x, elements, pivot, probed)
        same(compiled.gradient_sums(scaled, x, mask, pivot, probed), wanted)
        same(compiled.gradient_sums(scaled, x, mask, pivot, probed, fits=fits), wanted)
    of_channels = mean, offset, slope, scale, nonfinite
    wanted = rounded(reference.input_gradient(wide_dy, wide_x, elements, *of_channels), kind)
    same(compiled.input_gradient(dy, x, mask, *of_channels), wanted)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits(compiled: Compiled, shape: tuple[int, int, int], data: str, dtype: str) -> None:
    """Every kernel, on every layout, with and without masks."""
    rng = np.random.default_rng([*shape, DATA.index(data)])
    for kind in MASKS:
        x = (rng.normal(size=shape) * 10 + rng.normal(size=(1, shape[1], 1)) * 1000).astype(dtype)
        dy = rng.normal(size=shape).astype(dtype)
        dy[rng.random(shape) < 0.2] = 0
        if data == "constant":
            x[:] = 3
        if data == "tiny":
            x *= 1e-30
        if data == "on both sides":
            x = rng.normal(size=shape).astype(dtype)
        mask = masked(kind, shape, rng)
        unknown = Grid.unknown(dtype, shape[1])
        grid = unknown.probed(reference.probe(x, of_elements(mask, shape), unknown), np.ones(shape[1], bool))
        if data == "not finite" and x.size:
            x.reshape(-1)[rng.integers(x.size, size=2)] = np.nan, -np.inf
            dy.reshape(-1)[rng.integers(x.size, size=2)] = np.inf, np.nan
        if data == "outside":
            x *= 100
        if data.startswith("grown"):  # within the window still, but chains leave it: at once, or in a later block
            pivot = grid.pivot_C.astype(dtype)[:, None]
            late = slice(x.shape[0] * 3 // 4 if data == "grown late" else 0, None)
            x[late] = pivot + (x[late] - pivot) * (2**grid.precision.room * 0.75)
        if data == "half units":  # of the grid: what ties would be made of
            halves = rng.integers(-9, 9, shape) * 2 + 1
            pivot, unit = grid.pivot_C[:, None], grid.unit1_C[:, None] / 2
            x = np.where(rng.random(shape) < 0.5, x, np.where(pivot == 0, halves * unit, pivot)).astype(dtype)
            room = grid.precision.gradient_room + grid.precision.gradient_slack
            half = 2.0 ** (room + 2 - 52)  # dy reaches to some 2^2
            dy = np.where(rng.random(shape) < 0.5, dy, halves * half).astype(dtype)
        alike(compiled, x, dy, mask, grid, rng)


def sums(limbs: Array) -> list[list[int]]:
    """The sums of deviations and of squares."""
    return [as_ints(limbs[0], limbs[1]), as_ints(limbs[2], limbs[3])]


def in_pieces(compiled: Compiled, x: Array, grid: Grid) -> list[list[int]]:
    """The same sums, row by row."""
    return sums(np.add.reduce([compiled.moments(x[i : i + 1], None, grid) for i in range(x.shape[0])]))


WIDE = 64  # channels: so many make a row


@pytest.mark.parametrize("pivot", [0.0, 1.0, -3e7, 1e-20])
@pytest.mark.parametrize("reach", [0.01, 0.1, 0.249, 0.25, 0.251, 0.3, 0.4999, 0.5, 0.6, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("signs", ["one", "both"])
def test_a_chain_equals_the_sum_of_its_terms(compiled: Compiled, reach: float, pivot: float, signs: str) -> None:
    """Added one after the other as floats, or each as an integer: wherever in the window they lie, up to its end.

    From a quarter of it on, the squares of sixteen values leave theirs together; from a half of it on, of four.
    """
    rng = np.random.default_rng(0)
    for exponent in (-20, 5, 27):
        sign = 1.0 if signs == "one" else rng.choice([1.0, -1.0], (16, WIDE, 1))
        nudges = rng.choice([0, 1, 3], (16, WIDE, 1)) * rng.choice([2.0**-51, 2.0**-24, 2.0**-10], (1, WIDE, 1))
        grid = Grid("float32", np.full(WIDE, float(np.float32(pivot))), np.full(WIDE, exponent), True)
        x = (grid.pivot_C[0] + sign * (reach - nudges) * 2.0**exponent).astype(np.float32)
        wanted = reference.moments(x, None, grid)
        same(compiled.moments(x, None, grid), wanted)
        if not counted(wanted[-1])[0].any():
            assert sums(wanted) == in_pieces(compiled, x, grid)


@pytest.mark.parametrize("shape", [(40, WIDE, 1), (2, 5, 200)], ids=str)
def test_values_that_have_grown(compiled: Compiled, shape: tuple[int, int, int]) -> None:
    """Chains that leave the window are added again, in shorter ones."""
    channels = shape[1]
    grid = Grid("float32", np.zeros(channels), np.full(channels, 3), True)
    x = np.full(shape, 5.0, np.float32)
    wanted = reference.moments(x, None, grid)
    same(compiled.moments(x, None, grid), wanted)


@pytest.mark.parametrize("shape", [(5000, WIDE, 1), (2, 3, 9000), (9000, 1, 1)], ids=str)
@pytest.mark.parametrize("reach", [0.01, 0.0441, 0.0443, 0.088, 0.25])
def test_the_deviations_of_a_long_chain_have_room(
    compiled: Compiled, shape: tuple[int, int, int], reach: float
) -> None:
    """All of one sign, and as large as the squares of 512 allow: their sum is 22 windows long, and still exact.

    Of 5000 smaller ones, whose squares would hold, the sum would be 46 windows long.

    A twelfth of them end between two units, whose rounding a sum past its binade would lose.
    """
    rng = np.random.default_rng(0)
    grid = Grid("float32", np.full(shape[1], 0.0), np.full(shape[1], 10), True)
    x = np.full(shape, reach * 2.0**10, np.float32)
    x[rng.random(shape) < 1 / 12] = grid.unit1_C[0] * 0.75
    same(compiled.moments(x, None, grid), reference.moments(x, None, grid))


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40)),
    last=st.booleans(),
    mask=st.sampled_from(MASKS),
    exponent=st.integers(-40, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_same_bits_on_any_shape(
    shape: tuple[int, int, int], last: bool, mask: str, exponent: int, seed: int
) -> None:
    """The shapes that nobody thought of."""
    for compiled in every_set():
        same_bits_on(compiled, shape, last, mask, exponent, seed)


def same_bits_on(
    compiled: Compiled, shape: tuple[int, int, int], last: bool, mask: str, exponent: int, seed: int
) -> None:
    """Compare one set."""
    rng = np.random.default_rng(seed)
    shape = (shape[0] * shape[2], shape[1], 1) if last else shape
    x = np.ldexp(rng.standard_cauchy(shape), exponent).astype(np.float32)
    element_mask = masked(mask, shape, rng)
    unknown = Grid.unknown("float32", shape[1])
    grid = unknown.probed(reference.probe(x, of_elements(element_mask, shape), unknown), np.ones(shape[1], bool))
    with np.errstate(all="ignore"):
        alike(compiled, x, rng.normal(size=shape).astype(np.float32), element_mask, grid, rng)


@pytest.mark.parametrize("shape", [(20_000, 8, 1), (1, 2, 160_000)], ids=str)
def test_full_windows_do_not_overflow(compiled: Compiled, shape: tuple[int, int, int]) -> None:
    """Terms as large as they can be, more of them than a word holds before it is folded."""
    x = np.full(shape, np.nextafter(np.float32(4), np.float32(0)))
    channels = shape[1]
    grid = Grid("float32", np.zeros(channels), np.full(channels, 2), True)
    wanted = reference.moments(x, None, grid)
    assert not wanted[-1].any()
    same(compiled.moments(x, None, grid), wanted)
    exponents = np.full(channels, 2)
    backward = BackwardGrid("float32", exponents, exponents, True)
    mean = np.zeros(channels, np.float32)
    same(
        compiled.gradient_sums(x, x, None, mean, backward),
        reference.gradient_sums(x, x, None, mean, backward),
    )


@pytest.mark.parametrize("shape", [(200, 64, 1), (100, 24, 1), (3, 4, 700), (2, 5, 300)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_written_may_begin_anywhere(compiled: Compiled, shape: tuple[int, int, int], dtype: str) -> None:
    """Stores are moved to where cache lines begin, wherever an array does."""
    rng = np.random.default_rng(0)
    size, channels = int(np.prod(shape)), shape[1]
    x, dy = rng.normal(size=(2, *shape)).astype(dtype)
    mean, offset, slope, scale, shift = rng.normal(size=(5, channels)).astype(dtype)
    no_channel = np.zeros(channels, bool)
    room = np.zeros(size + 64, dtype)
    for begin in range(33):
        out = room[begin : begin + size].reshape(shape)
        arguments = x, mean, scale, shift, no_channel
        same(compiled.normalize(*arguments, out=out), reference.normalize(*arguments))
        same(
            compiled.input_gradient(dy, x, None, mean, offset, slope, scale, no_channel, out=out),
            reference.input_gradient(dy, x, None, mean, offset, slope, scale, no_channel),
        )
        room[begin : begin + size] = 0
        assert not room.any(), "something was written beside the array"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_backward_windows_at_their_ends(compiled: Compiled, dtype: str) -> None:
    """The smallest units, and the largest magic numbers: a float64 second fold had another unit in each kernel set."""
    rng = np.random.default_rng(0)
    precision = precision_of(dtype)
    x, dy = rng.normal(size=(2, 16, 8, 1))
    for gradient in (precision.lowest, precision.highest + 20):
        for deviation in (precision.deviation_floor, precision.deviation_ceiling):
            grid = BackwardGrid(dtype, np.full(8, gradient), np.full(8, deviation), True)
            with np.errstate(over="ignore"):
                g, h = (np.ldexp(v, e - 4).astype(dtype) for v, e in ((dy, gradient), (x, deviation)))
            arguments = g, h, None, np.zeros(8, h.dtype), grid
            same(compiled.gradient_sums(*arguments), reference.gradient_sums(*arguments))


@pytest.mark.parametrize("name", [*variants(), "reference"])
def test_padding_beyond_every_window_gives_no_wrong_gradient(chosen: pytest.MonkeyPatch, name: str) -> None:
    """float64: |x − mean|·|dy| of a masked place can't be summed at 1e306; it was, as bits of NaN, without a word."""
    chosen.setenv("BNLAYER_KERNELS", name)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 16, 2))
    mask = np.arange(16) > 0
    x[0], dy[0] = (1e306, 1.0), 2.0
    layer = BatchNormalization(dtype="float64")
    layer(x, training=True, mask=mask)
    dx = layer.backward(dy)
    assert layer.gamma is not None
    assert layer.gamma.gradient is not None
    assert np.isnan(layer.gamma.gradient).tolist() == np.isnan(dx).all(0).tolist() == [True, False]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(16, 4, 1), (2, 3, 21), (1, 2, 300)], ids=str)
def test_zeros_keep_their_signs(compiled: Compiled, shape: tuple[int, int, int], dtype: str) -> None:
    """−0 and +0 are different bits, in the probe's keys as in the output: of the data, and of the coefficients."""
    x = np.resize(np.array([0.0, -0.0, -0.0, 0.0, 1.0, -1.0], dtype), shape)
    grid = Grid.unknown(dtype, shape[1])
    same(compiled.probe(x, None, grid), reference.probe(x, None, grid))
    no_channel = np.zeros(shape[1], bool)
    for values in product((0.0, -0.0), (0.0, -0.0), (0.0, -0.0), (1.0, -1.0, -0.0)):
        first, second, third, scale = (np.full(shape[1], value, dtype) for value in values)
        written: tuple[Array, ...] = x, first, scale, second, no_channel
        same(compiled.normalize(*written), reference.normalize(*written))
        arguments = x, x, None, first, second, third, scale, no_channel
        same(compiled.input_gradient(*arguments), reference.input_gradient(*arguments))


@pytest.mark.parametrize("shape", [(9, 64, 1), (2, 3, 21)], ids=str)
def test_no_gradient_is_overlooked(compiled: Compiled, shape: tuple[int, int, int]) -> None:
    """One that is not finite, or outside its window: wherever it lies, among the vectors' halves and what is left."""
    rng = np.random.default_rng(0)
    dy, x = rng.normal(size=(2, *shape)).astype(np.float32)
    channels, pivot = shape[1], np.zeros(shape[1], np.float32)
    grid = BackwardGrid("float32", np.full(channels, 10), np.full(channels, 4), True)
    for index in range(dy.size):
        spoiled = dy.copy()
        spoiled.reshape(-1)[index] = (np.nan, -np.inf, -2000.0)[index % 3]
        wanted = reference.gradient_sums(spoiled, x, None, pivot, grid)
        assert (wanted[-2:] != reference.gradient_sums(dy, x, None, pivot, grid)[-2:]).any()
        same(compiled.gradient_sums(spoiled, x, None, pivot, grid, fits=True), wanted)


@pytest.mark.parametrize("shape", [(1100, 64, 1), (2, 3, 9000), (9000, 1, 1)], ids=str)
def test_the_gradients_of_a_long_chain_have_room(compiled: Compiled, shape: tuple[int, int, int]) -> None:
    """All near the window's end; the last place of tiny ones among them would be lost in a sum past its binade."""
    channels = shape[1]
    grid = BackwardGrid("float32", np.zeros(channels, np.int64), np.zeros(channels, np.int64), True)
    rng = np.random.default_rng(0)
    dy, x = np.full(shape, 0.999, np.float32), np.full(shape, 0.999, np.float32)
    dy[rng.random(shape) < 1 / 12] = 2.0**-19 * (1 + 2.0**-23)  # an odd multiple of the sum's unit, 2^-42
    pivot = np.zeros(channels, np.float32)
    wanted = reference.gradient_sums(dy, x, None, pivot, grid)
    assert not wanted[-2].any()
    same(compiled.gradient_sums(dy, x, None, pivot, grid, fits=True), wanted)


@pytest.mark.parametrize("shape", [(9, 64, 1), (2, 3, 21)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_where_windows_of_gradients_begin_and_end(compiled: Compiled, shape: tuple[int, int, int], dtype: str) -> None:
    """At a power of two a gradient is outside, or large; the number before it is not."""
    precision, channels = precision_of(dtype), shape[1]
    grid = BackwardGrid(dtype, np.full(channels, 5), np.full(channels, 3), True)
    pivot, one = np.zeros(channels, dtype), np.dtype(dtype).type(1)
    seen = set()
    for exponent in (5, 5 - precision.gradient_span):
        for largest in (np.ldexp(one, exponent), np.nextafter(np.ldexp(one, exponent), -one)):
            for reach in (np.ldexp(one, 3), np.nextafter(np.ldexp(one, 3), -one)):
                dy, x = np.full(shape, -largest, dtype), np.full(shape, reach, dtype)
                wanted = reference.gradient_sums(dy, x, None, pivot, grid)
                same(compiled.gradient_sums(dy, x, None, pivot, grid), wanted)
                seen.add(tuple(wanted[-2:, 0].tolist()))
    assert len(seen) == 4, "in and outside, large and small"


# (A, C, B): whole vectors, rows with some left over, long runs, runs shorter than a vector.
HALF_SHAPES = ((8192, 8, 1), (5041, 13, 1), (1, 2, 32_768), (9, 7, 1037), (4369, 3, 5))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", HALF_SHAPES, ids=str)
def test_half_types(compiled: Compiled, shape: tuple[int, int, int], dtype: str) -> None:
    """Every kernel: on numbers, and on all 65,536 patterns, infinities, NaN and subnormal numbers among them."""
    kind, size, rng = dtype_named(dtype), int(np.prod(shape)), np.random.default_rng([*shape])
    numbers = [(rng.normal(size=shape) * 10).astype(kind) for _ in range(2)]
    patterns = [rng.permutation(2**16).astype(np.uint16)[:size].view(kind).reshape(shape) for _ in range(2)]
    for x, dy in (numbers, patterns):
        for kind_of_mask in MASKS:
            mask = masked(kind_of_mask, shape, rng)
            unknown = Grid.unknown("float32", shape[1])
            probed = reference.probe(x.astype(np.float32), of_elements(mask, shape), unknown)
            alike(compiled, x, dy, mask, unknown.probed(probed, np.ones(shape[1], bool)), rng)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", HALF_SHAPES, ids=str)
def test_half_types_are_rounded_once(compiled: Compiled, shape: tuple[int, int, int], dtype: str) -> None:
    """To even where it is a tie, of normal and of subnormal numbers; to infinity from the tie above the largest on."""
    kind, size, rng = dtype_named(dtype), int(np.prod(shape)), np.random.default_rng([*shape])
    x = rng.permutation(2**16).astype(np.uint16)[:size].view(kind).reshape(shape)
    zero, no_channel = np.zeros(shape[1], np.float32), np.zeros(shape[1], bool)
    wide, ones = x.astype(np.float32), np.ones(shape, kind)
    for factor in (1, 1.5, 0.375, 1.25, -3, 1.001):
        scale = np.full(shape[1], factor, np.float32)
        wanted = rounded(wide * scale[:, None], kind)
        same(compiled.normalize(x, zero, scale, -zero, no_channel), wanted)
        same(compiled.input_gradient(x, ones, None, zero, zero, zero, scale, no_channel), wanted)
