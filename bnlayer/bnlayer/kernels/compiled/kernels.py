"""The compiled kernel set: the same functions as `reference`, and the same bits.

Where values are not finite, or leave their window, the fast passes see it and say so; which channels it was, and which
way, is then found by the reference. That happens at a step of a run that regrids, at one that is lost anyway, or where
a masked value that is not finite meets a gradient.

Shape suffixes: A axes before the channels, C channels, B axes after them.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.gradients import GradientSums
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import reference
from bnlayer.kernels.compiled import backward, elementwise, forward, probes
from bnlayer.kernels.compiled.vectors import LANES
from bnlayer.moments import Moments
from bnlayer.precision import exponent_above

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None

name = "compiled (Numba)"

_NARROW = 64  # channels: fewer are repeated, so that a row is worth a loop
_INTEGERS: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 8: np.dtype(np.int64)}
_EMPTY = {size: np.empty(0, dtype) for size, dtype in _INTEGERS.items()}


@cache
def _repeats(channels: int) -> int:
    """How many rows are taken for one, so that vectors divide its width."""
    least = LANES // gcd(channels, LANES)
    return least * max(1, _NARROW // (channels * least))


def _layout(x: Array) -> tuple[int, int]:
    """(repeats, 1) for channels in the last axis; (1, length of a run) otherwise, and for a single channel."""
    a, c, b = x.shape
    if b == 1 and c > 1:
        return _repeats(c), 1
    return 1, a if c == 1 and b == 1 else b


def _flat(array: Array) -> Array:
    """What a kernel reads: flat, and read-only, whether its owner's is or not: Numba compiles for one kind alone."""
    flat = array.reshape(-1)
    flat.flags.writeable = False
    return flat


def _elements(mask: NDArray[np.bool_], x: Array) -> NDArray[np.uint8]:
    """A mask with a place for every element."""
    return _flat(np.ascontiguousarray(np.broadcast_to(mask, x.shape)).view(np.uint8))


def _of_rows(mask: NDArray[np.bool_], x: Array) -> bool:
    return bool(mask.shape[1] == 1 and x.shape[2] == 1 and x.shape[1] > 1)


def _finer(x: Array) -> int | None:
    return 1 if x.dtype == np.float64 else None


def probe(x: Array, mask: Mask, grid: Grid) -> NDArray[np.int64]:
    """The largest keys of x and of −x over all finite unmasked values; see `reference.probe`."""
    best = np.full((2, x.shape[1]), grid.precision.no_key, _INTEGERS[x.dtype.itemsize])
    repeats, length = _layout(x)
    if x.size:
        probes.extremes(_flat(x), None if mask is None else _elements(mask, x), repeats, length, best)
    return np.asarray(best, np.int64)


def moments(x: Array, mask: Mask, grid: Grid) -> Moments:
    """The exact moments of a shard; see `reference.moments`."""
    limbs = np.empty((Moments.rows(grid.precision.folds), x.shape[1]), np.int64)
    repeats, length = _layout(x)
    pivot, exponent, finer = grid.pivot_C, grid.exponent_C, _finer(x)
    if not x.size:
        return reference.moments(x, mask, grid)
    if length > 1 or x.shape[1] == 1:
        element_mask = None if mask is None else _elements(mask, x)
        fit = forward.moments_of_runs(_flat(x), element_mask, finer, pivot, exponent, length, limbs)
    elif mask is not None and _of_rows(mask, x):
        starts = np.flatnonzero(mask) * x.shape[1]
        fit = forward.moments_of_rows(_flat(x), starts, None, finer, pivot, exponent, 1, limbs)
    else:
        element_mask = None if mask is None else _elements(mask, x)
        fit = forward.moments_of_rows(_flat(x), None, element_mask, finer, pivot, exponent, repeats, limbs)
    return Moments(limbs, grid) if fit else reference.moments(x, mask, grid)


def normalize(
    x: Array, mean_C: Array, scale_C: Array, shift_C: Array, nonfinite_C: Array, out: Array | None = None
) -> Array:
    """(x − mean)·scale + shift; see `reference.normalize`."""
    y = np.empty(x.shape, x.dtype) if out is None else out
    repeats, length = _layout(x)
    if not x.size:
        return y
    if length > 1 or x.shape[1] == 1:
        elementwise.normalize_runs(_flat(x), mean_C, scale_C, shift_C, nonfinite_C, length, y.reshape(-1))
    else:
        elementwise.normalize_rows(_flat(x), mean_C, scale_C, shift_C, nonfinite_C, repeats, y.reshape(-1))
    return y


def gradient_probe(dy: Array, x: Array, pivot_C: Array, grid: BackwardGrid) -> NDArray[np.int64]:
    """The exponents of the largest finite |dy| and |x − pivot|; see `reference.gradient_probe`."""
    best = np.zeros((2, x.shape[1]), _INTEGERS[x.dtype.itemsize])
    repeats, length = _layout(x)
    if x.size:
        probes.gradient_extremes(_flat(dy), _flat(x), pivot_C, repeats, length, best)
    lowest = grid.precision.lowest
    return np.maximum(exponent_above(best.view(x.dtype).astype(np.float64), lowest), lowest)


def gradient_sums(
    dy: Array, x: Array, mask: Mask, pivot_C: Array, grid: BackwardGrid, *, fits: bool = False
) -> GradientSums:
    """The exact sums of a shard's output gradients; see `reference.gradient_sums`."""
    limbs = np.empty((GradientSums.rows(grid.precision.folds), x.shape[1]), np.int64)
    repeats, length = _layout(x)
    check, finer = None if fits and mask is None else 1, _finer(x)
    top = _EMPTY[x.dtype.itemsize]
    gradient, deviation = grid.gradient_C, grid.deviation_C
    if not x.size:
        return reference.gradient_sums(dy, x, mask, pivot_C, grid)
    flat_dy, flat_x = _flat(dy), _flat(x)
    if length > 1 or x.shape[1] == 1:
        fit = backward.sums_of_runs(flat_dy, flat_x, check, finer, pivot_C, gradient, deviation, length, top, limbs)
    else:
        fit = backward.sums_of_rows(flat_dy, flat_x, check, finer, pivot_C, gradient, deviation, repeats, top, limbs)
    return GradientSums(limbs, grid) if fit else reference.gradient_sums(dy, x, mask, pivot_C, grid)


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
    """((dy − offset) − (x − mean)·slope)·scale, or dy·scale where masked; see `reference.input_gradient`."""
    dx = np.empty(x.shape, x.dtype) if out is None else out
    repeats, length = _layout(x)
    if not x.size:
        return dx
    flat_dy, flat_x, flat_dx = _flat(dy), _flat(x), dx.reshape(-1)
    if length > 1 or x.shape[1] == 1:
        elementwise.gradient_runs(flat_dy, flat_x, mean_C, offset_C, slope_C, scale_C, length, flat_dx)
    else:
        elementwise.gradient_rows(flat_dy, flat_x, mean_C, offset_C, slope_C, scale_C, repeats, flat_dx)
    if mask is not None:
        if _of_rows(mask, x):
            elementwise.scale_masked_rows(flat_dy, np.flatnonzero(~mask) * x.shape[1], scale_C, flat_dx)
        else:
            elementwise.scale_masked(flat_dy, _elements(mask, x), scale_C, length, flat_dx)
    elementwise.mark_nonfinite(flat_dx, nonfinite_C, length)
    return dx
