"""The backward pass that reduces: exact sums of the output's gradients.

Per element, with |g| < 2^wA and |h| < 2^wX:

    g = float64(dy)                                h = float64(x − pivot)
    A += round(g', to multiples of 2^(wA−42))      B += round(g'·h, to multiples of 2^(wA+wX−42))

g' is the float64 next to g towards 0, as fl(g·(1 − 2^-53)) gives it, so that neither A's terms nor B's have ties (see
`bnlayer.limbs`), and both are added up as chains: two float64 that stand in memory between the rows of a step and those
of the next. Operations go by halves of a vector: Zen 4 widens four float32 as it loads them, twice, in less time than
eight.

Whether all fits is read off the largest |dy| and |x − pivot|, as integers in the order of the numbers: infinity and NaN
are above every window. The latter is only looked at where the forward pass has not shown it already. M_A = 3·2^(wA+9)
and M_B = 3·2^(wA+wX+9) leave chains of 512 terms their last place, whatever fits.

float64 data have a second fold, for what the first one rounds away; theirs are rounded term by term, ties to even.

Layouts are those of `forward`. The sums A and B of a place lie as `folds` has them, then, in the data's own width, its
pivot, the largest |dy| and the largest |x − pivot|, as `_beside` says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.double import add_product, add_products
from bnlayer.kernels.compiled.folds import (
    AHEAD,
    FLOATS_OF_LINE,
    LONGEST,
    SHRINK,
    all_zero,
    begin,
    channel_after,
    discount,
    fold,
    gather,
    magic,
    part,
    power,
    sums,
    where_is,
)
from bnlayer.kernels.compiled.jit import inlined, kernel, lines
from bnlayer.kernels.compiled.simd import (
    bits,
    broadcast,
    first_half,
    fused,
    greater,
    load,
    load_again,
    load_half,
    magnitude,
    number,
    prefetch,
    second_half,
    store,
    where,
    widen,
)
from bnlayer.kernels.compiled.vectors import HALF, LANES
from bnlayer.precision import DOUBLE, SINGLE

Array = NDArray[Any]

# Rows at a step. Of 4 KB each, twice as many of both arrays would fight for the eight ways of one cache set.
_ROWS = 4
_PIVOT, _LARGEST_GRADIENT, _LARGEST_DEVIATION = range(3)
_SLACK, _SPAN, _FINER_SPAN = SINGLE.gradient_slack, SINGLE.gradient_span, DOUBLE.gradient_span


@inlined
def _height(check: Any, finer: Any) -> int:
    """The lines of eight places: a line holds one of what is beside the sums, or two if it is narrow."""
    if check is None:
        return 5 if finer is None else 10
    return 6 if finer is None else 11


@inlined
def _beside(at: int, what: int, check: Any, finer: Any) -> int:
    """The index of what is kept beside the sums, in an array of numbers as wide as the data's."""
    block = at // LANES * _height(check, finer)
    start = (block + 4) * 2 if finer is None else block + 8
    return (start + what) * LANES + at % LANES


@inlined
def _accumulators(
    gradient: Array, deviation: Array, pivot: Array, repeats: int, lanes: int, check: Any, finer: Any
) -> Array:
    """The places of a pass, as in `forward`; the largest magnitudes are 0."""
    width, height = pivot.size * lanes * repeats, _height(check, finer)
    accumulators = lines(width * height)
    pivots = accumulators.view(pivot.dtype)
    c = 0
    for at in range(width):
        a = gradient[c] + (_SLACK if finer is None else 0)
        b = a + deviation[c]
        accumulators[where_is(at, magic(0, 0), height)] = bits(3.0 * power(a))
        accumulators[where_is(at, magic(0, 1), height)] = bits(3.0 * power(b))
        if finer is not None:
            accumulators[where_is(at, magic(1, 0), height)] = bits(3.0 * power(a - 52))
            accumulators[where_is(at, magic(1, 1), height)] = bits(3.0 * power(b - 52))
        pivots[_beside(at, _PIVOT, check, finer)] = pivot[c]
        c = channel_after(c, at, pivot.size, lanes)
    begin(accumulators, height, 1 if finer is None else 2)
    return accumulators


@inlined
def _chain(
    dy: Array, x: Array, check: Any, start: int, stride: int, steps: int, ahead: bool, centred: bool, at: int,
    chains: Array, pivots: Array, largest: Array,
) -> None:  # fmt: skip
    """Add `steps` times eight elements of float32, `stride` apart from `start` on, to the chains of eight places.

    Args:
        ahead: whether they are all of a step's rows: cache lines that come after them are asked for.
        centred: whether all pivots are 0.
        chains, pivots, largest: the places, as float64, and as the data's numbers and integers of their width.
    """
    block = at * _height(check, None)
    to_a, to_b = block + sums(0, 0) * LANES, block + sums(0, 1) * LANES
    to_g, to_h = _beside(at, _LARGEST_GRADIENT, check, None), _beside(at, _LARGEST_DEVIATION, check, None)
    a_first, a_second = load_half(chains, to_a), load_half(chains, to_a + HALF)
    b_first, b_second = load_half(chains, to_b), load_half(chains, to_b + HALF)
    pivot, top_g = load(pivots, _beside(at, _PIVOT, check, None)), load(largest, to_g)
    top_h = load(largest, to_g if check is None else to_h)
    if ahead:
        for line in range(0, _ROWS * LANES, FLOATS_OF_LINE):
            later = start + at * (_ROWS - 1) + AHEAD + line  # of the row's beginning + 4·at
            prefetch(x, later)
            prefetch(dy, later)
    shrink = first_half(broadcast(SHRINK))
    for j in range(steps):
        index = start + j * stride
        if check is None and centred:
            h_first, h_second = load_half(x, index), load_half(x, index + HALF)
        else:
            deviation = load(x, index) - pivot
            if check is not None:  # what meets no gradient does not matter
                deviation = where(magnitude(load(dy, index)), deviation)
                top_h = greater(top_h, magnitude(deviation))
            h_first, h_second = first_half(deviation), second_half(deviation)
        g_first, g_second = widen(load_half(dy, index)) * shrink, widen(load_half(dy, index + HALF)) * shrink
        a_first, a_second = a_first + g_first, a_second + g_second
        b_first = fused(g_first, widen(h_first), b_first)
        b_second = fused(g_second, widen(h_second), b_second)
        top_g = greater(top_g, magnitude(load_again(dy, index)))
    store(chains, to_a, a_first)
    store(chains, to_a + HALF, a_second)
    store(chains, to_b, b_first)
    store(chains, to_b + HALF, b_second)
    store(largest, to_g, top_g)
    if check is not None:
        store(largest, to_h, top_h)


@inlined
def _step(
    dy: Array, x: Array, check: Any, finer: Any, start: int, stride: int, steps: int, ahead: bool, centred: bool,
    at: int, accumulators: Array, chains: Array, pivots: Array, largest: Array,
) -> None:  # fmt: skip
    """Add eight elements `steps` times, in the eight places from `at` on."""
    if finer is None:
        _chain(dy, x, check, start, stride, steps, ahead, centred, at, chains, pivots, largest)
    else:
        to_p, to_g = _beside(at, _PIVOT, check, 1), _beside(at, _LARGEST_GRADIENT, check, 1)
        to_h, height = _beside(at, _LARGEST_DEVIATION, check, 1), _height(check, 1)
        add_products(dy, x, check, start, stride, steps, at, accumulators, height, pivots, to_p, largest, to_g, to_h)


@inlined
def _one(
    dy: Array, x: Array, check: Any, finer: Any, index: int, at: int, accumulators: Array, pivots: Array, largest: Array
) -> None:
    """Add one element in one place."""
    height = _height(check, finer)
    gradient = dy[index]
    deviation = x[index] - pivots[_beside(at, _PIVOT, check, finer)]
    size = magnitude(gradient)
    top_g = _beside(at, _LARGEST_GRADIENT, check, finer)
    largest[top_g] = max(largest[top_g], size)
    if check is not None:
        top_h = _beside(at, _LARGEST_DEVIATION, check, finer)
        deviation = where(size, deviation)
        largest[top_h] = max(largest[top_h], magnitude(deviation))
    g, h = widen(gradient), widen(deviation)
    if finer is None:
        to_a, to_b = where_is(at, sums(0, 0), height), where_is(at, sums(0, 1), height)
        shrunk = g * SHRINK
        accumulators[to_a] = bits(shrunk + number(accumulators[to_a]))
        accumulators[to_b] = bits(fused(shrunk, h, number(accumulators[to_b])))
    else:
        add_product(g, h, at, accumulators, height)


@inlined
def _largest(largest: Array, check: Any, finer: Any, width: int, channels: int, lanes: int) -> Array:
    """The largest |dy| of each channel, and the largest |x − pivot| where that was looked at; (2, at least C)."""
    found = np.zeros((2, width), largest.dtype)
    for at in range(0, width, LANES):
        store(found, at, load(largest, _beside(at, _LARGEST_GRADIENT, check, finer)))
        if check is not None:
            store(found, width + at, load(largest, _beside(at, _LARGEST_DEVIATION, check, finer)))
    once = channels * lanes
    for row in range(2):
        for first in range(once, width, once):
            for at in range(once):
                found[row, at] = max(found[row, at], found[row, first + at])
        if lanes > 1:
            for c in range(channels):
                found[row, c] = found[row, c * lanes : (c + 1) * lanes].max()
    return found


@inlined
def _finish(
    largest: Array, check: Any, finer: Any, width: int, gradient: Array, deviation: Array, lanes: int, limbs: Array
) -> bool:
    """Write the flags; whether all values were finite and within their windows."""
    channels = limbs.shape[1]
    found = _largest(largest, check, finer, width, channels, lanes)
    fit, span = True, _SPAN if finer is None else _FINER_SPAN
    for c in range(channels):
        top_g = widen(number(found[0, c]))
        fit &= top_g < power(gradient[c])
        limbs[-2, c] = 0
        limbs[-1, c] = (np.int64(top_g >= power(gradient[c] - span)) << 32) | np.int64(found[0, c] > 0)
    if check is not None:
        for c in range(channels):
            fit &= widen(number(found[1, c])) < power(deviation[c])
    return fit


@inlined
def _rows(
    dy: Array, x: Array, check: Any, finer: Any, first: int, last: int, centred: bool, width: int, accumulators: Array,
    chains: Array, pivots: Array, largest: Array,
) -> None:  # fmt: skip
    """Add the rows from `first` to `last`."""
    whole = first + (last - first) // _ROWS * _ROWS
    for i in range(first, whole, _ROWS):
        for c in range(0, width, LANES):
            at = i * width + c
            _step(dy, x, check, finer, at, width, _ROWS, True, centred, c, accumulators, chains, pivots, largest)
    for c in range(0, width, LANES):
        at = whole * width + c
        _step(dy, x, check, finer, at, width, last - whole, False, centred, c, accumulators, chains, pivots, largest)


@inlined
def _runs(
    dy: Array, x: Array, check: Any, finer: Any, first: int, last: int, begun: int, end: int, length: int,
    centred: bool, accumulators: Array, chains: Array, pivots: Array, largest: Array,
) -> None:  # fmt: skip
    """Add the places from `begun` to `end` of all runs of some images."""
    height = _height(check, finer)
    channels = accumulators.size // (height * LANES)
    whole = (end - begun) // LANES
    for image in range(first, last):
        for c in range(channels):
            start, at = (image * channels + c) * length + begun, c * LANES
            _step(dy, x, check, finer, start, LANES, whole, False, centred, at, accumulators, chains, pivots, largest)
            rest = start + whole * LANES
            for lane in range((end - begun) % LANES):
                _one(dy, x, check, finer, rest + lane, at + lane, accumulators, pivots, largest)
                if finer is not None:
                    discount(accumulators, height, at + lane)


@kernel
def sums_of_rows(
    dy: Array, x: Array, check: Any, finer: Any, pivot: Array, gradient: Array, deviation: Array, repeats: int,
    top: Array, limbs: Array,
) -> bool:  # fmt: skip
    """The words of rows of channels.

    Args:
        dy, x: flat.
        check: not None: look at the deviations too; otherwise the forward pass has shown that they fit.
        finer: not None: float64 data, with a second fold.
        pivot: (C,), of x's dtype.
        gradient, deviation: (C,), the grid.
        repeats: how many rows are taken for one, so that vectors divide its width.
        top: empty, of the integers that are as wide as x's numbers.
        limbs: (W, C), receives the sums.

    Returns:
        Whether all values were finite and within their windows; if not, the words are worth nothing.
    """
    width, height, folds = pivot.size * repeats, _height(check, finer), 1 if finer is None else 2
    accumulators = _accumulators(gradient, deviation, pivot, repeats, 1, check, finer)
    chains, pivots, largest = (
        accumulators.view(np.float64),
        accumulators.view(pivot.dtype),
        accumulators.view(top.dtype),
    )
    totals = np.zeros((4 * folds, width), np.int64)
    rows, centred = x.size // width, all_zero(pivot)
    for first in range(0, rows, LONGEST):
        last = min(first + LONGEST, rows)
        if finer is not None:
            _rows(dy, x, check, finer, first, last, False, width, accumulators, chains, pivots, largest)
        elif check is None and centred:
            _rows(dy, x, None, None, first, last, True, width, accumulators, chains, pivots, largest)
        else:
            _rows(dy, x, check, None, first, last, False, width, accumulators, chains, pivots, largest)
        fold(accumulators, height, folds, totals, 0 if finer is None else last - first)
    rest = x.size - rows * width
    for c in range(rest):
        _one(dy, x, check, finer, rows * width + c, c, accumulators, pivots, largest)
        if finer is not None:
            discount(accumulators, height, c)
    if rest:
        fold(accumulators, height, folds, totals, 0)
    gather(totals, 1, repeats, limbs)
    return _finish(largest, check, finer, width, gradient, deviation, 1, limbs)


@kernel
def sums_of_runs(
    dy: Array, x: Array, check: Any, finer: Any, pivot: Array, gradient: Array, deviation: Array, length: int,
    top: Array, limbs: Array,
) -> bool:  # fmt: skip
    """The words of runs of one channel after the other, each `length` long; otherwise as `sums_of_rows`."""
    height, folds = _height(check, finer), 1 if finer is None else 2
    width, images = pivot.size * LANES, x.size // (pivot.size * length)
    accumulators = _accumulators(gradient, deviation, pivot, 1, LANES, check, finer)
    chains, pivots, largest = (
        accumulators.view(np.float64),
        accumulators.view(pivot.dtype),
        accumulators.view(top.dtype),
    )
    totals = np.zeros((4 * folds, width), np.int64)
    centred, first, begun = all_zero(pivot), 0, 0
    while first < images:
        end, last = part(length, begun, first, images, LONGEST)
        if finer is not None:
            _runs(dy, x, check, finer, first, last, begun, end, length, False, accumulators, chains, pivots, largest)
        elif check is None and centred:
            _runs(dy, x, None, None, first, last, begun, end, length, True, accumulators, chains, pivots, largest)
        else:
            _runs(dy, x, check, None, first, last, begun, end, length, False, accumulators, chains, pivots, largest)
        fold(accumulators, height, folds, totals, 0 if finer is None else (end - begun) // LANES * (last - first))
        first, begun = (last, 0) if end == length else (first, end)
    gather(totals, LANES, 1, limbs)
    return _finish(largest, check, finer, width, gradient, deviation, LANES, limbs)
