"""The backward pass that reduces: exact sums of the output's gradients.

Per element, with |g| < 2^wA and |h| < 2^wX:

    g = float64(dy)                                h = float64(x − pivot)
    A += bits(g·(1 − 2^-53) + M_A) − bits(M_A)     B += bits(g·h + M_B) − bits(M_B)

with one rounding each (`fused`), and the two bits(M) subtracted once, at the fold. Gradients are added in chains, as
deviations are in `forward`; their products have ties, and go term by term.

Whether all fits is read off the largest |dy| and |x − pivot|, as integers in the order of the numbers: infinity and NaN
are above every window. The latter is only looked at where the forward pass has not shown it already. Chains of four
keep their last place if the largest gradient is less than a quarter of the window, which leaves it a factor of 64 since
the probe; beyond that the block is added again, term by term, and so is the rest of the pass.

Layouts are those of `forward`. The sums A and B of a place lie as `folds` has them, then, in the data's own width, its
pivot, the largest |dy| and the largest |x − pivot|, as `_beside` says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.folds import (
    AHEAD,
    BLOCK,
    FLOATS_OF_LINE,
    FOLD_EVERY,
    SHRINK,
    all_zero,
    channel_after,
    discount,
    fold,
    forget,
    gather,
    magic,
    power,
    sums,
    where_is,
)
from bnlayer.kernels.compiled.jit import inlined, kernel, lines
from bnlayer.kernels.compiled.simd import (
    LANES,
    all_negative,
    bits,
    broadcast,
    fused,
    greater,
    load,
    magnitude,
    number,
    prefetch,
    store,
    where,
    widen,
)

Array = NDArray[Any]

# Rows at a step, and terms of a chain. Of 4 KB each, twice as many of both arrays would fight for the eight ways of one
# cache set.
_ROWS = 4
_PIVOT, _LARGEST_GRADIENT, _LARGEST_DEVIATION = range(3)


@inlined
def _height(check: Any, fine: Any) -> int:
    """The lines of eight places: a line holds one of what is beside the sums, or two if it is narrow."""
    if check is None:
        return 5 if fine is None else 10
    return 6 if fine is None else 11


@inlined
def _beside(at: int, what: int, check: Any, fine: Any) -> int:
    """The index of what is kept beside the sums, in an array of numbers as wide as the data's."""
    block = at // LANES * _height(check, fine)
    start = (block + 4) * 2 if fine is None else block + 8
    return (start + what) * LANES + at % LANES


@inlined
def _places(gradient: Array, deviation: Array, pivot: Array, repeats: int, lanes: int, check: Any, fine: Any) -> Array:
    """The places of a pass, as in `forward`; the largest magnitudes are 0."""
    width, height = pivot.size * lanes * repeats, _height(check, fine)
    places = lines(width * height)
    pivots = places.view(pivot.dtype)
    c = 0
    for at in range(width):
        a, b = gradient[c], gradient[c] + deviation[c]
        places[where_is(at, magic(0, 0), height)] = bits(3.0 * power(a))
        places[where_is(at, magic(0, 1), height)] = bits(3.0 * power(b))
        if fine is not None:
            places[where_is(at, magic(1, 0), height)] = bits(3.0 * power(a - 52))
            places[where_is(at, magic(1, 1), height)] = bits(3.0 * power(b - 52))
        pivots[_beside(at, _PIVOT, check, fine)] = pivot[c]
        c = channel_after(c, at, pivot.size, lanes)
    return places


@inlined
def _step(
    dy: Array, x: Array, check: Any, fine: Any, start: int, stride: int, steps: int, chain: int, ahead: bool,
    centred: bool, at: int, places: Array, pivots: Array, largest: Array,
) -> None:  # fmt: skip
    """Add `steps` times eight elements, `stride` apart from `start` on, in the eight places from `at` on, in chains.

    Args:
        ahead: whether they are all of a step's rows: cache lines that come after them are asked for.
        centred: whether all pivots are 0.
        pivots, largest: the same memory as `places`, as the data's numbers and as integers of their width.
    """
    block = at * _height(check, fine)
    m_a, m_b = number(load(places, block + magic(0, 0) * LANES)), number(load(places, block + magic(0, 1) * LANES))
    a, b = load(places, block + sums(0, 0) * LANES), load(places, block + sums(0, 1) * LANES)
    last = 0 if fine is None else 1  # as in `forward`
    m_a_fine = number(load(places, block + magic(last, 0) * LANES))
    m_b_fine = number(load(places, block + magic(last, 1) * LANES))
    a_fine, b_fine = load(places, block + sums(last, 0) * LANES), load(places, block + sums(last, 1) * LANES)
    pivot = load(pivots, _beside(at, _PIVOT, check, fine))
    top_g = load(largest, _beside(at, _LARGEST_GRADIENT, check, fine))
    top_h = load(largest, _beside(at, _PIVOT if check is None else _LARGEST_DEVIATION, check, fine))
    if ahead:
        for line in range(0, _ROWS * LANES, FLOATS_OF_LINE):
            later = start + at * (_ROWS - 1) + AHEAD + line  # of the row's beginning + 4·at
            prefetch(x, later)
            prefetch(dy, later)
    shrink = broadcast(SHRINK)
    for link in range(0, steps, chain):
        a_chain = m_a
        for j in range(link, link + chain):
            gradient = load(dy, start + j * stride)
            deviation = load(x, start + j * stride) if centred else load(x, start + j * stride) - pivot
            size = magnitude(gradient)
            top_g = greater(top_g, size)
            if check is not None:
                deviation = where(size, deviation)  # what meets no gradient does not matter
                top_h = greater(top_h, magnitude(deviation))
            g, h = widen(gradient), widen(deviation)
            if fine is None:
                a_chain = fused(g, shrink, a_chain)
                b = b + bits(fused(g, h, m_b))
            else:
                product = g * h
                a_chain, b_rounded = g + m_a, product + m_b
                a_fine = a_fine + bits(g - (a_chain - m_a) + m_a_fine)
                b = b + bits(b_rounded)
                b_fine = b_fine + bits(product - (b_rounded - m_b) + m_b_fine)
        a = a + bits(a_chain)
    store(places, block + sums(0, 0) * LANES, a)
    store(places, block + sums(0, 1) * LANES, b)
    store(largest, _beside(at, _LARGEST_GRADIENT, check, fine), top_g)
    if check is not None:
        store(largest, _beside(at, _LARGEST_DEVIATION, check, fine), top_h)
    if fine is not None:
        store(places, block + sums(1, 0) * LANES, a_fine)
        store(places, block + sums(1, 1) * LANES, b_fine)


@inlined
def _one(
    dy: Array, x: Array, check: Any, fine: Any, index: int, at: int, places: Array, pivots: Array, largest: Array
) -> None:
    """Add one element in one place."""
    height = _height(check, fine)
    gradient = dy[index]
    deviation = x[index] - pivots[_beside(at, _PIVOT, check, fine)]
    size = magnitude(gradient)
    top_g = _beside(at, _LARGEST_GRADIENT, check, fine)
    largest[top_g] = max(largest[top_g], size)
    if check is not None:
        top_h = _beside(at, _LARGEST_DEVIATION, check, fine)
        deviation = where(size, deviation)
        largest[top_h] = max(largest[top_h], magnitude(deviation))
    g, h = widen(gradient), widen(deviation)
    m_a = number(places[where_is(at, magic(0, 0), height)])
    m_b = number(places[where_is(at, magic(0, 1), height)])
    if fine is None:
        places[where_is(at, sums(0, 0), height)] += bits(fused(g, SHRINK, m_a))
        places[where_is(at, sums(0, 1), height)] += bits(fused(g, h, m_b))
    else:
        product = g * h
        a, b = g + m_a, product + m_b
        m_a_fine = number(places[where_is(at, magic(1, 0), height)])
        m_b_fine = number(places[where_is(at, magic(1, 1), height)])
        places[where_is(at, sums(0, 0), height)] += bits(a)
        places[where_is(at, sums(0, 1), height)] += bits(b)
        places[where_is(at, sums(1, 0), height)] += bits(g - (a - m_a) + m_a_fine)
        places[where_is(at, sums(1, 1), height)] += bits(product - (b - m_b) + m_b_fine)


@inlined
def _largest(largest: Array, check: Any, fine: Any, width: int, channels: int, lanes: int) -> Array:
    """The largest |dy| of each channel, and the largest |x − pivot| where that was looked at; (2, at least C)."""
    found = np.zeros((2, width), largest.dtype)
    for at in range(0, width, LANES):
        store(found, at, load(largest, _beside(at, _LARGEST_GRADIENT, check, fine)))
        if check is not None:
            store(found, width + at, load(largest, _beside(at, _LARGEST_DEVIATION, check, fine)))
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
    largest: Array, check: Any, fine: Any, width: int, gradient: Array, deviation: Array, lanes: int, words: Array
) -> bool:
    """Write the flags; whether all values were finite and within their windows."""
    channels = words.shape[1]
    found = _largest(largest, check, fine, width, channels, lanes)
    fit = True
    for c in range(channels):
        top_g = widen(number(found[0, c]))
        fit &= top_g < power(gradient[c])
        words[-2, c] = 0
        words[-1, c] = (np.int64(top_g >= power(gradient[c] - 20)) << 32) | np.int64(found[0, c] > 0)
    if check is not None:
        for c in range(channels):
            fit &= widen(number(found[1, c])) < power(deviation[c])
    return fit


@inlined
def _chains_held(places: Array, largest: Array, check: Any, width: int) -> bool:
    """Whether all gradients of float32 so far were below a quarter of their windows, 2^wA/4 = M_A/12."""
    below = broadcast(np.int64(-1))
    for at in range(0, width, LANES):
        top = widen(number(load(largest, _beside(at, _LARGEST_GRADIENT, check, None))))
        below = below & (magnitude(broadcast(12.0) * top) - load(places, at * _height(check, None)))
    return bool(all_negative(below))


@inlined
def _rows(
    dy: Array, x: Array, check: Any, fine: Any, first: int, last: int, chain: int, centred: bool, width: int,
    places: Array, pivots: Array, largest: Array,
) -> int:  # fmt: skip
    """Add the rows from `first` to `last`; how many chains that were, each place."""
    whole = first + (last - first) // _ROWS * _ROWS
    for i in range(first, whole, _ROWS):
        for c in range(0, width, LANES):
            _step(dy, x, check, fine, i * width + c, width, _ROWS, chain, True, centred, c, places, pivots, largest)
    for c in range(0, width, LANES):
        _step(dy, x, check, fine, whole * width + c, width, last - whole, 1, False, centred, c, places, pivots, largest)
    return (whole - first) // chain + last - whole


@inlined
def _chained_rows(
    dy: Array, x: Array, check: Any, first: int, last: int, centred: bool, width: int, places: Array, pivots: Array,
    largest: Array,
) -> int:  # fmt: skip
    """`_rows` in chains; without a subtraction where there is none, and no deviation to look at."""
    if check is None:  # noqa: SIM102 - by itself, so that Numba makes no second loop where there is a check
        if centred:
            return _rows(dy, x, check, None, first, last, _ROWS, True, width, places, pivots, largest)
    return _rows(dy, x, check, None, first, last, _ROWS, False, width, places, pivots, largest)


@inlined
def _runs(
    dy: Array, x: Array, check: Any, fine: Any, first: int, last: int, begin: int, end: int, length: int, chain: int,
    centred: bool, places: Array, pivots: Array, largest: Array,
) -> int:  # fmt: skip
    """Add the places from `begin` to `end` of all runs of some images; how many chains that were, each lane."""
    channels = places.size // (_height(check, fine) * LANES)
    whole = (end - begin) // LANES
    linked = whole // _ROWS * _ROWS
    for image in range(first, last):
        for c in range(channels):
            start, at = (image * channels + c) * length + begin, c * LANES
            rest = start + linked * LANES
            _step(dy, x, check, fine, start, LANES, linked, chain, False, centred, at, places, pivots, largest)
            _step(dy, x, check, fine, rest, LANES, whole - linked, 1, False, centred, at, places, pivots, largest)
            for index in range(start + whole * LANES, start + end - begin):
                _one(dy, x, check, fine, index, at, places, pivots, largest)
    return (linked // chain + whole - linked) * (last - first)


@inlined
def _chained_runs(
    dy: Array, x: Array, check: Any, first: int, last: int, begin: int, end: int, length: int, centred: bool,
    places: Array, pivots: Array, largest: Array,
) -> int:  # fmt: skip
    """`_runs` in chains, as `_chained_rows`."""
    if check is None:  # noqa: SIM102 - as in `_chained_rows`
        if centred:
            return _runs(dy, x, check, None, first, last, begin, end, length, _ROWS, True, places, pivots, largest)
    return _runs(dy, x, check, None, first, last, begin, end, length, _ROWS, False, places, pivots, largest)


@kernel
def sums_of_rows(
    dy: Array, x: Array, check: Any, fine: Any, pivot: Array, gradient: Array, deviation: Array, repeats: int,
    top: Array, words: Array,
) -> bool:  # fmt: skip
    """The words of rows of channels.

    Args:
        dy, x: flat.
        check: not None: look at the deviations too; otherwise the forward pass has shown that they fit.
        fine: not None: float64 data, with a second fold.
        pivot: (C,), of x's dtype.
        gradient, deviation: (C,), the grid.
        repeats: how many rows are taken for one, so that vectors divide its width.
        top: empty, of the integers that are as wide as x's numbers.
        words: (W, C), receives the sums.

    Returns:
        Whether all values were finite and within their windows; if not, the words are worth nothing.
    """
    width, height, folds = pivot.size * repeats, _height(check, fine), 1 if fine is None else 2
    places = _places(gradient, deviation, pivot, repeats, 1, check, fine)
    pivots, largest = places.view(pivot.dtype), places.view(top.dtype)
    totals = np.zeros((4 * folds, width), np.int64)
    rows = x.size // width
    centred, chained = all_zero(pivot), fine is None
    for first in range(0, rows, BLOCK):
        last = min(first + BLOCK, rows)
        chains = last - first
        if fine is None:  # noqa: SIM102 - by itself, so that Numba leaves out what float64 never does
            if chained:
                chains = _chained_rows(dy, x, check, first, last, centred, width, places, pivots, largest)
                if not _chains_held(places, largest, check, width):
                    chained = False
                    forget(places, height, folds)
        if not chained:
            chains = _rows(dy, x, check, fine, first, last, 1, False, width, places, pivots, largest)
        fold(places, height, folds, totals, chains, last - first)
    rest = x.size - rows * width
    for c in range(rest):
        _one(dy, x, check, fine, rows * width + c, c, places, pivots, largest)
        discount(places, height, folds, c, 1, 1)
    if rest:
        fold(places, height, folds, totals, 0, 0)
    gather(totals, 1, repeats, words)
    return _finish(largest, check, fine, width, gradient, deviation, 1, words)


@kernel
def sums_of_runs(
    dy: Array, x: Array, check: Any, fine: Any, pivot: Array, gradient: Array, deviation: Array, length: int,
    top: Array, words: Array,
) -> bool:  # fmt: skip
    """The words of runs of one channel after the other, each `length` long; otherwise as `sums_of_rows`."""
    channels, height, folds = pivot.size, _height(check, fine), 1 if fine is None else 2
    width = channels * LANES
    places = _places(gradient, deviation, pivot, 1, LANES, check, fine)
    pivots, largest = places.view(pivot.dtype), places.view(top.dtype)
    totals = np.zeros((4 * folds, width), np.int64)
    images = x.size // (channels * length)
    piece = min(length, (FOLD_EVERY - LANES) * LANES)
    centred, chained = all_zero(pivot), fine is None
    for begin in range(0, length, piece):
        end = min(begin + piece, length)
        whole, loose = (end - begin) // LANES, (end - begin) % LANES
        at_once = max(1, FOLD_EVERY // (whole + LANES))
        for first in range(0, images, at_once):
            last = min(first + at_once, images)
            chains = 0
            if fine is None:  # noqa: SIM102 - by itself, so that Numba leaves out what float64 never does
                if chained:
                    chains = _chained_runs(
                        dy, x, check, first, last, begin, end, length, centred, places, pivots, largest
                    )
                    if not _chains_held(places, largest, check, width):
                        chained = False
                        forget(places, height, folds)
            if not chained:
                chains = _runs(dy, x, check, fine, first, last, begin, end, length, 1, False, places, pivots, largest)
            singles = loose * (last - first)
            for c in range(channels):
                discount(places, height, folds, c * LANES, singles, singles)
            fold(places, height, folds, totals, chains, whole * (last - first))
    gather(totals, LANES, 1, words)
    return _finish(largest, check, fine, width, gradient, deviation, LANES, words)
