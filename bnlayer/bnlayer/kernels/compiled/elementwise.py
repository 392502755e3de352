"""The passes that write: y and dx. One rounding per operation, in the data's own dtype.

Arrays come flat, with the coefficients of a row (`rows`: as wide as vectors divide) or of a channel (`runs`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.jit import inlined, kernel
from bnlayer.kernels.compiled.simd import LANES, broadcast, load, store

Array = NDArray[Any]


@inlined
def _normal(x: Any, mean: Any, scale: Any, shift: Any) -> Any:
    return (x - mean) * scale + shift


@inlined
def _gradient(dy: Any, x: Any, mean: Any, offset: Any, slope: Any, scale: Any) -> Any:
    return ((dy - offset) - (x - mean) * slope) * scale


@inlined
def _poison(out: Array, poisoned: Array, length: int) -> None:
    channels = poisoned.size
    some = False
    for c in range(channels):
        some |= poisoned[c]
    if not some:
        return
    for at in range(out.size):
        if poisoned[at // length % channels]:
            out[at] = np.nan


@kernel
def poison(out: Array, poisoned: Array, length: int) -> None:
    """NaN in the channels that are poisoned."""
    _poison(out, poisoned, length)


@kernel
def normalize_rows(x: Array, mean: Array, scale: Array, shift: Array, poisoned: Array, y: Array) -> None:
    """(x − mean)·scale + shift, NaN where poisoned, for coefficients as wide as a row."""
    width = mean.size
    rows = x.size // width
    for at in range(rows * width, x.size):
        c = at - rows * width
        y[at] = _normal(x[at], mean[c], scale[c], shift[c])
    for start in range(0, rows * width, width):
        for c in range(0, width, LANES):
            store(y, start + c, _normal(load(x, start + c), load(mean, c), load(scale, c), load(shift, c)))
    _poison(y, poisoned, 1)


@kernel
def normalize_runs(x: Array, mean: Array, scale: Array, shift: Array, poisoned: Array, length: int, y: Array) -> None:
    """The same for runs of one channel after the other, each `length` long."""
    channels = mean.size
    runs = x.size // length
    for run in range(runs):
        c = run % channels
        m, a, b = broadcast(mean[c]), broadcast(scale[c]), broadcast(shift[c])
        whole = length // LANES * LANES
        start = run * length
        for at in range(start, start + whole, LANES):
            store(y, at, _normal(load(x, at), m, a, b))
        for at in range(start + whole, start + length):
            y[at] = _normal(x[at], mean[c], scale[c], shift[c])
    _poison(y, poisoned, length)


@kernel
def gradient_rows(dy: Array, x: Array, mean: Array, offset: Array, slope: Array, scale: Array, dx: Array) -> None:
    """((dy − offset) − (x − mean)·slope)·scale, for coefficients as wide as a row."""
    width = mean.size
    rows = x.size // width
    for at in range(rows * width, x.size):
        c = at - rows * width
        dx[at] = _gradient(dy[at], x[at], mean[c], offset[c], slope[c], scale[c])
    for start in range(0, rows * width, width):
        for c in range(0, width, LANES):
            m, o, k, a = load(mean, c), load(offset, c), load(slope, c), load(scale, c)
            store(dx, start + c, _gradient(load(dy, start + c), load(x, start + c), m, o, k, a))


@kernel
def gradient_runs(
    dy: Array, x: Array, mean: Array, offset: Array, slope: Array, scale: Array, length: int, dx: Array
) -> None:
    """The same for runs of one channel after the other, each `length` long."""
    channels = mean.size
    runs = x.size // length
    for run in range(runs):
        c = run % channels
        m, o, k, a = broadcast(mean[c]), broadcast(offset[c]), broadcast(slope[c]), broadcast(scale[c])
        whole = length // LANES * LANES
        start = run * length
        for at in range(start, start + whole, LANES):
            store(dx, at, _gradient(load(dy, at), load(x, at), m, o, k, a))
        for at in range(start + whole, start + length):
            dx[at] = _gradient(dy[at], x[at], mean[c], offset[c], slope[c], scale[c])


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
