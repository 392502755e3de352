"""The passes that write: y and dx. One rounding per operation, in the data's own dtype.

Arrays come flat, as in `forward`, with the coefficients of the channels.

What is written begins where a cache line does: NumPy's arrays begin 16 bytes behind, and every other store would then
touch two lines, which takes a quarter longer. So rows are taken from the first such place on, and the coefficients are
turned by as many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.jit import LINE, inlined, kernel
from bnlayer.kernels.compiled.simd import broadcast, load, store
from bnlayer.kernels.compiled.vectors import LANES

Array = NDArray[Any]

_LONG = 256  # elements: a shorter run is not worth two loops over single ones


@inlined
def _normal(x: Any, mean: Any, scale: Any, shift: Any) -> Any:
    return (x - mean) * scale + shift


@inlined
def _gradient(dy: Any, x: Any, mean: Any, offset: Any, slope: Any, scale: Any) -> Any:
    return ((dy - offset) - (x - mean) * slope) * scale


@inlined
def _mark_nonfinite(out: Array, nonfinite: Array, length: int) -> None:
    channels = nonfinite.size
    some = False
    for c in range(channels):
        some |= nonfinite[c]
    if not some:
        return
    for at in range(out.size):
        if nonfinite[at // length % channels]:
            out[at] = np.nan


@kernel
def mark_nonfinite(out: Array, nonfinite: Array, length: int) -> None:
    """NaN in the channels that are nonfinite."""
    _mark_nonfinite(out, nonfinite, length)


@inlined
def _unaligned(out: Array, begin: int, end: int) -> int:
    """How many elements from `begin` on lie before the next cache line, or before `end`."""
    address = out.ctypes.data + begin * out.itemsize
    return min(-address % LINE // out.itemsize, end - begin)


@inlined
def _turned(coefficients: Array, by: int, repeats: int) -> Array:
    """As wide as the rows, for rows that begin so many elements later."""
    channels = coefficients.size
    turned = np.empty(channels * repeats, coefficients.dtype)
    c = by % channels
    for at in range(turned.size):
        turned[at] = coefficients[c]
        c = c + 1 if c + 1 < channels else 0
    return turned


@kernel
def normalize_rows(x: Array, mean: Array, scale: Array, shift: Array, nonfinite: Array, repeats: int, y: Array) -> None:
    """(x − mean)·scale + shift, NaN where nonfinite, for channels in the last axis.

    Args:
        x, y: flat.
        mean, scale, shift, nonfinite: (C,).
        repeats: how many rows are taken for one, so that vectors divide its width.
    """
    channels = mean.size
    width = channels * repeats
    begin = _unaligned(y, 0, y.size)
    end = begin + (y.size - begin) // width * width
    for at in range(begin):
        c = at % channels
        y[at] = _normal(x[at], mean[c], scale[c], shift[c])
    m, a, b = _turned(mean, begin, repeats), _turned(scale, begin, repeats), _turned(shift, begin, repeats)
    for start in range(begin, end, width):
        for c in range(0, width, LANES):
            store(y, start + c, _normal(load(x, start + c), load(m, c), load(a, c), load(b, c)))
    for at in range(end, y.size):
        c = at % channels
        y[at] = _normal(x[at], mean[c], scale[c], shift[c])
    _mark_nonfinite(y, nonfinite, 1)


@kernel
def normalize_runs(x: Array, mean: Array, scale: Array, shift: Array, nonfinite: Array, length: int, y: Array) -> None:
    """The same for runs of one channel after the other, each `length` long."""
    for start in range(0, y.size, length):
        c = start // length % mean.size
        m, a, b = mean[c], scale[c], shift[c]
        end = start + length
        begin = start + (_unaligned(y, start, end) if length >= _LONG else 0)
        whole = begin + (end - begin) // LANES * LANES
        for at in range(start, begin):
            y[at] = _normal(x[at], m, a, b)
        for at in range(begin, whole, LANES):
            store(y, at, _normal(load(x, at), broadcast(m), broadcast(a), broadcast(b)))
        for at in range(whole, end):
            y[at] = _normal(x[at], m, a, b)
    _mark_nonfinite(y, nonfinite, length)


@kernel
def gradient_rows(
    dy: Array, x: Array, mean: Array, offset: Array, slope: Array, scale: Array, repeats: int, dx: Array
) -> None:
    """((dy − offset) − (x − mean)·slope)·scale, for channels in the last axis; otherwise as `normalize_rows`."""
    channels = mean.size
    width = channels * repeats
    begin = _unaligned(dx, 0, dx.size)
    end = begin + (dx.size - begin) // width * width
    for at in range(begin):
        c = at % channels
        dx[at] = _gradient(dy[at], x[at], mean[c], offset[c], slope[c], scale[c])
    m, o = _turned(mean, begin, repeats), _turned(offset, begin, repeats)
    k, a = _turned(slope, begin, repeats), _turned(scale, begin, repeats)
    for start in range(begin, end, width):
        for c in range(0, width, LANES):
            at = start + c
            store(dx, at, _gradient(load(dy, at), load(x, at), load(m, c), load(o, c), load(k, c), load(a, c)))
    for at in range(end, dx.size):
        c = at % channels
        dx[at] = _gradient(dy[at], x[at], mean[c], offset[c], slope[c], scale[c])


@kernel
def gradient_runs(
    dy: Array, x: Array, mean: Array, offset: Array, slope: Array, scale: Array, length: int, dx: Array
) -> None:
    """The same for runs of one channel after the other, each `length` long."""
    for start in range(0, dx.size, length):
        c = start // length % mean.size
        m, o, k, a = mean[c], offset[c], slope[c], scale[c]
        end = start + length
        begin = start + (_unaligned(dx, start, end) if length >= _LONG else 0)
        whole = begin + (end - begin) // LANES * LANES
        for at in range(start, begin):
            dx[at] = _gradient(dy[at], x[at], m, o, k, a)
        mv, ov, kv, av = broadcast(m), broadcast(o), broadcast(k), broadcast(a)
        for at in range(begin, whole, LANES):
            store(dx, at, _gradient(load(dy, at), load(x, at), mv, ov, kv, av))
        for at in range(whole, end):
            dx[at] = _gradient(dy[at], x[at], m, o, k, a)


@kernel
def scale_masked(dy: Array, mask: Array, scale: Array, length: int, dx: Array) -> None:
    """dy·scale where the mask is 0: such a position was not in the statistics. Other places of dx stay.

    Args:
        dy, dx: flat.
        mask: flat, of their size.
        scale: (C,).
        length: of the runs of one channel; 1 for channels in the last axis.
    """
    channels = scale.size
    for at in range(dy.size):
        if not mask[at]:
            dx[at] = dy[at] * scale[at // length % channels]


@kernel
def scale_masked_rows(dy: Array, starts: Array, scale: Array, dx: Array) -> None:
    """The same for whole rows, which begin at `starts`."""
    for i in range(starts.size):
        start = starts[i]
        for c in range(scale.size):
            dx[start + c] = dy[start + c] * scale[c]
