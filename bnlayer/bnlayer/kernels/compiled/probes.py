"""The probes: how far the data of a channel reach. A layer makes one before its first step, and few later.

Layouts are those of `forward`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.jit import inlined, kernel
from bnlayer.kernels.compiled.simd import (
    broadcast,
    either,
    finite,
    greater,
    key,
    load,
    load_truths,
    magnitude,
    negated,
    store,
    where,
)
from bnlayer.kernels.compiled.vectors import LANES

Array = NDArray[Any]


@inlined
def _keys(x: Any, none: Any) -> tuple[Any, Any]:
    """The keys of x and −x; `none` where x is not finite."""
    live = finite(x)
    return either(live, key(x), none), either(live, key(negated(x)), none)


@inlined
def _sizes(dy: Any, x: Any, pivot: Any) -> tuple[Any, Any]:
    """|dy| and |x − pivot| as integers; 0 where they are not finite, and no deviation where dy is 0."""
    size = magnitude(where(finite(dy), dy))
    deviation = x - pivot
    return size, magnitude(where(size, where(finite(deviation), deviation)))


@inlined
def _raise(top: Array, best: Array, lanes: int) -> None:
    """Raise what was found so far, per channel, to the best of each place."""
    for at in range(best.shape[1]):
        c = at // lanes % top.shape[1]
        top[0, c] = max(top[0, c], best[0, at])
        top[1, c] = max(top[1, c], best[1, at])


@kernel
def extremes(x: Array, mask: Any, repeats: int, length: int, top: Array) -> None:
    """Raise `top`, (2, C), to the largest keys of x and of −x.

    Args:
        x: flat.
        mask: flat, of x's size, 0 where an element does not count; None: all do.
        repeats: how many rows are taken for one (see `forward`), where `length` is 1.
        length: of the runs of one channel; 1 for channels in the last axis.
        top: the keys so far, in integers as wide as x's numbers.
    """
    channels = top.shape[1]
    lanes = 1 if length == 1 else LANES
    width = channels * repeats * lanes
    best = np.empty((2, width), top.dtype)
    for at in range(width):
        best[0, at] = best[1, at] = top[0, at // lanes % channels]
    none = top[0, 0]
    for c in range(1, channels):
        none = min(none, top[0, c])
    row = width if length == 1 else length
    whole = row // LANES * LANES
    for begin in range(0, x.size, row):
        end = min(begin + row, x.size)
        base = 0 if length == 1 else begin // length % channels * LANES
        stop = begin + whole if end - begin == row else begin
        for at in range(begin, stop, LANES):
            lane = base + at - begin if lanes == 1 else base
            up, down = _keys(load(x, at), broadcast(none))
            if mask is not None:
                truth = load_truths(mask, at)
                up, down = either(truth, up, broadcast(none)), either(truth, down, broadcast(none))
            store(best, lane, greater(load(best, lane), up))
            store(best, width + lane, greater(load(best, width + lane), down))
        for at in range(stop, end):
            lane = base + at - begin if lanes == 1 else base
            if mask is None or mask[at]:
                up, down = _keys(x[at], none)
                best[0, lane] = max(best[0, lane], up)
                best[1, lane] = max(best[1, lane], down)
    _raise(top, best, lanes)


@kernel
def gradient_extremes(dy: Array, x: Array, pivot: Array, repeats: int, length: int, top: Array) -> None:
    """Raise `top`, (2, C), to the largest magnitudes of dy and of x − pivot; the rest as in `extremes`."""
    channels = top.shape[1]
    lanes = 1 if length == 1 else LANES
    width = channels * repeats * lanes
    best, pivots = np.zeros((2, width), top.dtype), np.empty(width, x.dtype)
    for at in range(width):
        pivots[at] = pivot[at // lanes % channels]
    row = width if length == 1 else length
    whole = row // LANES * LANES
    for begin in range(0, x.size, row):
        end = min(begin + row, x.size)
        base = 0 if length == 1 else begin // length % channels * LANES
        stop = begin + whole if end - begin == row else begin
        for at in range(begin, stop, LANES):
            lane = base + at - begin if lanes == 1 else base
            size, deviation = _sizes(load(dy, at), load(x, at), load(pivots, lane))
            store(best, lane, greater(load(best, lane), size))
            store(best, width + lane, greater(load(best, width + lane), deviation))
        for at in range(stop, end):
            lane = base + at - begin if lanes == 1 else base
            size, deviation = _sizes(dy[at], x[at], pivots[lane])
            best[0, lane] = max(best[0, lane], size)
            best[1, lane] = max(best[1, lane], deviation)
    _raise(top, best, lanes)
