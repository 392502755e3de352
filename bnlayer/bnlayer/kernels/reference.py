"""The kernels in NumPy: the oracle of every faster set, and what serves where there is none.

Each pass goes through the data in blocks that fit a cache, so that its temporaries stay small. All sums are
integers (see `bnlayer.limbs`), so the blocks can't be seen in the result.

Shape suffixes: A axes before the channels, C channels, B axes after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels.formulas import coefficients, gradients, moved, sample, statistics
from bnlayer.kernels.results import BatchStatistics, TrainingCall
from bnlayer.limbs import (
    LOW,
    carried,
    flags,
    integers,
    integers_without_ties,
    product_error,
    remainder,
    square_integers,
)
from bnlayer.precision import exponent_above, power_of_two

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None

__all__ = [
    "backward_at", "coefficients", "finish_backward", "finish_forward", "forward_at", "gradient_probe", "gradient_sums",
    "gradients", "has_calls_alone", "input_gradient", "moments", "moved", "name", "normalize", "probe",
    "pull_alone", "sample", "statistics", "takes", "train_alone",
]  # fmt: skip

name = "reference (NumPy)"


def takes(x: Array, mask: Mask) -> bool:
    """Whether the passes take a batch as it is: float32 or float64, with a mask that broadcasts to it."""
    return x.dtype in _TAKEN and (mask is None or mask.shape[2] in (0, 1, x.shape[2]))


_TAKEN = frozenset((np.dtype(np.float32), np.dtype(np.float64)))
_BLOCK = 2**16  # elements: half a megabyte per float64 temporary, a handful of which fit a second-level cache


def _blocks(shape: tuple[int, int, int]) -> Iterator[tuple[slice, slice]]:
    """Slices of the first and last axis, together covering an (A, C, B) array."""
    a, c, b = shape
    step_b = b if c * b <= _BLOCK else max(1, _BLOCK // c)
    step_a = max(1, _BLOCK // max(1, c * step_b))
    for i in range(0, a, step_a):
        for j in range(0, b, max(1, step_b)):
            yield slice(i, i + step_a), slice(j, j + step_b)


def _cut(mask: Mask, rows: slice, columns: slice) -> Mask:
    return None if mask is None else mask[rows, :, columns]


class _Sum:
    """A running exact sum over blocks, [hi, lo] per fold."""

    def __init__(self, channels: int, magics: list[NDArray[np.float64]]) -> None:
        self._magics = magics
        self._limbs = [np.zeros(channels, np.int64) for _ in range(2 * len(magics))]

    def add_values(self, v: NDArray[np.float64]) -> None:
        """Add a block of values."""
        if len(self._magics) == 1:
            self._add(0, integers_without_ties(v, self._magics[0]))
        else:
            self._add_folds(v)

    def add_squares(self, d: NDArray[np.float64]) -> None:
        """Add a block of squares."""
        if len(self._magics) == 1:
            self._add(0, square_integers(d, self._magics[0]))
        else:
            self._add_folds(d * d, product_error(d, d))

    def add_products(self, g: NDArray[np.float64], h: NDArray[np.float64]) -> None:
        """Add a block of products."""
        if len(self._magics) == 1:
            self._add(0, integers_without_ties(g * h, self._magics[0]))
        else:
            self._add_folds(g * h)

    def _add_folds(self, v: NDArray[np.float64], error: NDArray[np.float64] | None = None) -> None:
        """Add terms in two folds; `error` is what v itself lacks of the exact term."""
        self._add(0, integers(v, self._magics[0]))
        rest = remainder(v, self._magics[0])
        self._add(2, integers(rest if error is None else rest + error, self._magics[1]))

    def _add(self, at: int, q: NDArray[np.int64]) -> None:
        hi = self._limbs[at] + (q >> 32).sum((0, 2))
        lo = self._limbs[at + 1] + (q & LOW).sum((0, 2))
        self._limbs[at], self._limbs[at + 1] = carried(hi, lo)

    @property
    def limbs(self) -> list[NDArray[np.int64]]:
        """The carried limbs."""
        return self._limbs


def _signed(exponent: NDArray[np.int64], folds: int) -> list[NDArray[np.float64]]:
    """Magic numbers for |v| < 2^exponent, and for what is rounded away, on a grid 2^52 finer."""
    first = 3.0 * power_of_two(exponent)
    return [m[:, None] for m in (first, np.ldexp(first, -52))[:folds]]


def _positive(exponent: NDArray[np.int64], folds: int) -> list[NDArray[np.float64]]:
    """Magic numbers for 0 ≤ v < 4^exponent, and for what is rounded away, on a grid 2^51 finer.

    Room for twice a unit: what the product itself lacks of the square comes on top of what is rounded away.
    """
    first = power_of_two(2 * exponent)
    second = 1.5 * power_of_two(2 * exponent - 51)
    return [m[:, None] for m in (first, second)[:folds]]


def probe(x: Array, mask: Mask, grid: Grid) -> NDArray[np.int64]:
    """The largest keys of x and of −x over all finite unmasked values.

    Args:
        x: (A, C, B), float32 or float64.
        mask: broadcasts to x; True where a value counts.
        grid: its precision says which keys.

    Returns:
        (2, C) int64.
    """
    precision = grid.precision
    best = np.full((2, x.shape[1]), precision.no_key, np.int64)
    for rows, columns in _blocks(_shape(x)):
        block, m = x[rows, :, columns], _cut(mask, rows, columns)
        live = np.isfinite(block) if m is None else np.isfinite(block) & m
        for side, signed in enumerate((block, -block)):
            keys = precision.key(np.ascontiguousarray(np.where(live, signed, -np.inf).astype(precision.dtype)))
            best[side] = np.maximum(best[side], keys.max((0, 2), initial=precision.no_key))
    return best


def moments(x: Array, mask: Mask, grid: Grid) -> NDArray[np.int64]:
    """The exact moments of a shard: Σ(x − pivot), Σ(x − pivot)², count, and what did not fit.

    Args:
        x: (A, C, B), float32 or float64.
        mask: (A, 1, 1), (A, C, B), or what `View` makes between them; True where a value counts.
        grid: what to count in.

    Returns:
        (4·folds + 2, C) int64: per fold S_hi, S_lo; per fold T_hi, T_lo; count; flags (out of range, not finite).
    """
    folds, channels = grid.precision.folds, x.shape[1]
    deviations = _Sum(channels, _signed(grid.exponent_C + grid.precision.slack, folds))
    squares = _Sum(channels, _positive(grid.exponent_C, folds))
    count = np.zeros(channels, np.int64)
    out_of_range, not_finite = np.zeros(channels, bool), np.zeros(channels, bool)
    pivot, window = grid.pivot_C[:, None], grid.window_C[:, None]
    for rows, columns in _blocks(_shape(x)):
        block, m = x[rows, :, columns], _cut(mask, rows, columns)
        with np.errstate(over="ignore", invalid="ignore"):
            d = block.astype(np.float64) - pivot
            fits = np.abs(d) < window
        if m is None:
            count += block.shape[0] * block.shape[2]
            good = bool(fits.all())
        else:
            m = np.broadcast_to(m, block.shape)
            count += m.sum((0, 2))
            good = False
        if not good:
            finite = np.isfinite(block)
            counted = finite if m is None else finite & m
            out_of_range |= (counted & ~fits).any((0, 2))
            not_finite |= (~finite if m is None else m & ~finite).any((0, 2))
            d = np.where(counted & fits, d, 0.0)
        deviations.add_values(d)
        squares.add_squares(d)
    return np.stack([*deviations.limbs, *squares.limbs, count, flags(out_of_range, not_finite)])


def normalize(
    x: Array, mean_C: Array, scale_C: Array, shift_C: Array, nonfinite_C: Array, out: Array | None = None
) -> Array:
    """(x − mean)·scale + shift, one rounding per operation; NaN in nonfinite channels.

    Args:
        x: (A, C, B).
        mean_C, scale_C, shift_C: (C,), of x's dtype.
        nonfinite_C: (C,) bool.
        out: where to write it, contiguous, of x's shape and dtype; None: into a new array.

    Returns:
        `out`.
    """
    y = np.empty(x.shape, x.dtype) if out is None else out
    with np.errstate(over="ignore", invalid="ignore"):
        np.subtract(x, mean_C[:, None], out=y)
        np.multiply(y, scale_C[:, None], out=y)
        np.add(y, shift_C[:, None], out=y)
    if nonfinite_C.any():
        y[:, nonfinite_C, :] = np.nan
    return y


def gradient_probe(dy: Array, x: Array, pivot_C: Array, grid: BackwardGrid) -> NDArray[np.int64]:
    """The exponents of the largest finite |dy| and |x − pivot|.

    Returns:
        (2, C) int64; the grid's lowest exponent where there is none.
    """
    lowest = grid.precision.lowest
    best = np.full((2, x.shape[1]), lowest, np.int64)
    for rows, columns in _blocks(_shape(x)):
        g, h = _factors(dy[rows, :, columns], x[rows, :, columns], pivot_C)
        for side, values in enumerate((g, h)):
            largest = np.abs(values).max((0, 2), initial=0.0)
            best[side] = np.maximum(best[side], exponent_above(largest, lowest))
    return best


def gradient_sums(
    dy: Array, x: Array, mask: Mask, pivot_C: Array, grid: BackwardGrid, *, fits: bool = False
) -> NDArray[np.int64]:
    """The exact sums of a shard's output gradients: Σ dy and Σ dy·(x − pivot) over all positions.

    Args:
        dy, x: (A, C, B), of one dtype.
        mask: broadcasts to x; a dy that is not finite counts as 0 where it is False, and poisons where it is True.
        pivot_C: (C,), of x's dtype.
        grid: what to count in.
        fits: whether the forward pass has shown that every x is finite, and x − pivot within its window: a kernel
            need not look again.

    Returns:
        (4·folds + 2, C) int64: per fold A_hi, A_lo; per fold B_hi, B_lo; flags (out of range, not finite); flags (some
        |dy| lies in the upper part of its window, some is not 0).
    """
    del fits
    folds, channels = grid.precision.folds, x.shape[1]
    wide = grid.gradient_C + grid.precision.gradient_slack
    sums = _Sum(channels, _signed(wide, folds))
    products = _Sum(channels, _signed(wide + grid.deviation_C, folds))
    seen = {name: np.zeros(channels, bool) for name in ("out_of_range", "not_finite", "large", "any")}
    window, reach = power_of_two(grid.gradient_C)[:, None], power_of_two(grid.deviation_C)[:, None]
    small = power_of_two(grid.gradient_C - grid.precision.gradient_span)[:, None]
    for rows, columns in _blocks(_shape(x)):
        block, m = dy[rows, :, columns], _cut(mask, rows, columns)
        g, h = _factors(block, x[rows, :, columns], pivot_C)
        size = np.abs(g)
        outside = (size >= window) | (np.abs(h) >= reach)
        finite = np.isfinite(block)
        seen["not_finite"] |= (~finite if m is None else m & ~finite).any((0, 2))
        seen["large"] |= (size >= small).any((0, 2))
        seen["any"] |= (g != 0).any((0, 2))
        if outside.any():
            seen["out_of_range"] |= outside.any((0, 2))
            g, h = np.where(outside, 0.0, g), np.where(outside, 0.0, h)
        sums.add_values(g)
        products.add_products(g, h)
    unfit, sizes = flags(seen["out_of_range"], seen["not_finite"]), flags(seen["large"], seen["any"])
    return np.stack([*sums.limbs, *products.limbs, unfit, sizes])


def input_gradient(
    dy: Array,
    x: Array,
    mask: Mask,
    mean_C: Array,
    offset_C: Array,
    slope_C: Array,
    scale_C: Array,
    nonfinite_C: Array,
    out: Array | None = None,
) -> Array:
    """((dy − offset) − (x − mean)·slope)·scale where unmasked, dy·scale where masked; NaN in nonfinite channels.

    Args:
        dy, x: (A, C, B), of one dtype.
        mask: broadcasts to x.
        mean_C, offset_C, slope_C, scale_C: (C,), of x's dtype.
        nonfinite_C: (C,) bool.
        out: where to write it, contiguous, of x's shape and dtype; None: into a new array.

    Returns:
        `out`.
    """
    dx = np.empty(x.shape, x.dtype) if out is None else out
    with np.errstate(over="ignore", invalid="ignore"):
        for rows, columns in _blocks(_shape(x)):
            block, g, m = dx[rows, :, columns], dy[rows, :, columns], _cut(mask, rows, columns)
            np.subtract(x[rows, :, columns], mean_C[:, None], out=block)
            np.multiply(block, slope_C[:, None], out=block)
            np.subtract(g - offset_C[:, None], block, out=block)
            if m is not None:
                np.copyto(block, g, where=~m)
            np.multiply(block, scale_C[:, None], out=block)
    if nonfinite_C.any():
        dx[:, nonfinite_C, :] = np.nan
    return dx


def _factors(dy: Array, x: Array, pivot_C: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """dy and x − pivot as float64; 0 where they are not finite, and no deviation where dy is 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        d = x - pivot_C[:, None]
    g = np.where(np.isfinite(dy), dy, 0).astype(np.float64)
    h = np.where((g != 0) & np.isfinite(d), d, 0).astype(np.float64)
    return g, h


def _shape(x: Array) -> tuple[int, int, int]:
    a, c, b = x.shape
    return a, c, b


def finish_forward(x: Array, limbs: NDArray[np.int64], grid: Grid, call: TrainingCall, *, accepted: bool) -> None:
    """None: one after the other."""
    del x, limbs, grid, call, accepted


def has_calls_alone(arithmetic: np.dtype[Any], variables: np.dtype[Any]) -> bool:
    """False: they go by an exchange with nobody."""
    del arithmetic, variables
    return False


def train_alone(*arguments: Any) -> None:
    """None: by an exchange with nobody."""
    del arguments


def pull_alone(*arguments: Any) -> None:
    """None: by an exchange with nobody."""
    del arguments


def forward_at(*arguments: Any) -> bool:
    """False: not on addresses."""
    del arguments
    return False


def backward_at(*arguments: Any) -> bool:
    """False: not on addresses."""
    del arguments
    return False


def finish_backward(
    dy: Array,
    x: Array,
    mask: Mask,
    limbs: NDArray[np.int64],
    grid: BackwardGrid,
    forward: BatchStatistics,
    scale_C: Array,
    *,
    accepted: bool,
) -> None:
    """None: one after the other."""
    del dy, x, mask, limbs, grid, forward, scale_C, accepted
