"""The backward pass that reduces: exact sums of the output's gradients.

Per element, with |g| < 2^wA and |h| < 2^wX:

    g = float64(dy)                                h = float64(x − mean)
    A += bits(g·(1 − 2^-53) + M_A) − bits(M_A)     B += bits(g·h + M_B) − bits(M_B)

with one rounding each (`fused`), and the two bits(M) subtracted once, at the fold. Gradients are added in chains, as
deviations are in `forward`; their products have ties, and go term by term.

Whether all fits is read off the largest |dy| and |x − mean|, as integers in the order of the numbers: infinity and NaN
are above every window. The latter is only looked at where the forward pass has not shown it already. Chains of four
keep their last place if the largest gradient is less than a quarter of the window, which leaves it a factor of 64 since
the probe; beyond that the block is added again, term by term, and so is the rest of the pass.

Layouts are those of `forward`, folds and arrays those of `folds`; the sums here are A, B, and A, B of the second fold,
and the largest magnitudes are kept beside them.
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
    fold,
    gather,
    power,
    repeated,
)
from bnlayer.kernels.compiled.jit import inlined, kernel, lines
from bnlayer.kernels.compiled.simd import (
    LANES,
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


@inlined
def _constants(gradient: Array, deviation: Array, repeats: int, lanes: int) -> Array:
    """M_A, M_B, and those of the second fold; places as in `forward`."""
    channels = gradient.size
    width = channels * lanes * repeats
    constants = lines(4, width, np.float64)
    for at in range(channels * lanes):
        c = at if lanes == 1 else at // lanes
        a, b = gradient[c], gradient[c] + deviation[c]
        constants[0, at] = 3.0 * power(a)
        constants[1, at] = 3.0 * power(b)
        constants[2, at] = 3.0 * power(a - 52)
        constants[3, at] = 3.0 * power(b - 52)
    repeated(constants, channels * lanes)
    return constants


@inlined
def _means(mean: Array, width: int, lanes: int) -> Array:
    """The means, places as in `_constants`."""
    means = lines(1, width, mean.dtype)
    for at in range(mean.size * lanes):
        means[0, at] = mean[at if lanes == 1 else at // lanes]
    repeated(means, mean.size * lanes)
    return means


@inlined
def _step(
    dy: Array, x: Array, check: Any, fine: Any, start: int, stride: int, steps: int, chain: int, ahead: bool,
    at: int, means: Array, constants: Array, sums: Array, largest: Array,
) -> None:  # fmt: skip
    """Add `steps` times eight elements, `stride` apart from `start` on, in the eight places from `at` on, in chains.

    Args:
        ahead: whether they are all of a step's rows: cache lines that come after them are asked for.
    """
    width = means.shape[1]
    mean, m_a, m_b = load(means, at), load(constants, at), load(constants, width + at)
    a, b = load(sums, at), load(sums, width + at)
    a_fine, b_fine = load(sums, 2 * width + at), load(sums, 3 * width + at)
    top_g, top_h = load(largest, at), load(largest, width + at)
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
            deviation = load(x, start + j * stride) - mean
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
                a_fine = a_fine + bits(g - (a_chain - m_a) + load(constants, 2 * width + at))
                b = b + bits(b_rounded)
                b_fine = b_fine + bits(product - (b_rounded - m_b) + load(constants, 3 * width + at))
        a = a + bits(a_chain)
    store(sums, at, a)
    store(sums, width + at, b)
    store(largest, at, top_g)
    if check is not None:
        store(largest, width + at, top_h)
    if fine is not None:
        store(sums, 2 * width + at, a_fine)
        store(sums, 3 * width + at, b_fine)


@inlined
def _one(
    dy: Array, x: Array, check: Any, fine: Any, index: int, at: int, means: Array, constants: Array, sums: Array,
    largest: Array,
) -> None:  # fmt: skip
    """Add one element in one place."""
    gradient = dy[index]
    deviation = x[index] - means[0, at]
    size = magnitude(gradient)
    largest[0, at] = max(largest[0, at], size)
    if check is not None:
        deviation = where(size, deviation)
        largest[1, at] = max(largest[1, at], magnitude(deviation))
    g, h = widen(gradient), widen(deviation)
    m_a, m_b = constants[0, at], constants[1, at]
    if fine is None:
        sums[0, at] += bits(fused(g, SHRINK, m_a))
        sums[1, at] += bits(fused(g, h, m_b))
    else:
        product = g * h
        a, b = g + m_a, product + m_b
        sums[0, at] += bits(a)
        sums[1, at] += bits(b)
        sums[2, at] += bits(g - (a - m_a) + constants[2, at])
        sums[3, at] += bits(product - (b - m_b) + constants[3, at])


@inlined
def _finish(largest: Array, gradient: Array, deviation: Array, lanes: int, words: Array) -> bool:
    """Write the flags; whether all values were finite and within their windows."""
    channels = words.shape[1]
    fit = True
    for c in range(channels):
        words[-2, c] = 0
        words[-1, c] = 0
    for c in range(channels):
        window, small, reach = power(gradient[c]), power(gradient[c] - 20), power(deviation[c])
        for first in range(c * lanes, largest.shape[1], channels * lanes):
            for at in range(first, first + lanes):
                top_g, top_h = widen(number(largest[0, at])), widen(number(largest[1, at]))
                fit &= top_g < window and top_h < reach
                words[-1, c] |= (np.int64(top_g >= small) << 32) | np.int64(largest[0, at] > 0)
    return fit


@inlined
def _chains_held(largest: Array, gradient: Array, lanes: int) -> bool:
    """Whether all gradients so far were small enough to be added in chains."""
    held = True
    for c in range(gradient.size):
        quarter = power(gradient[c] - 2)
        for first in range(c * lanes, largest.shape[1], gradient.size * lanes):
            for at in range(first, first + lanes):
                held &= widen(number(largest[0, at])) < quarter
    return held


@inlined
def _rows(
    dy: Array, x: Array, check: Any, fine: Any, first: int, last: int, chain: int, means: Array, constants: Array,
    sums: Array, largest: Array,
) -> int:  # fmt: skip
    """Add the rows from `first` to `last`; how many chains that were, each place."""
    width = means.shape[1]
    whole = first + (last - first) // _ROWS * _ROWS
    for i in range(first, whole, _ROWS):
        for c in range(0, width, LANES):
            _step(dy, x, check, fine, i * width + c, width, _ROWS, chain, True, c, means, constants, sums, largest)
    for c in range(0, width, LANES):
        _step(dy, x, check, fine, whole * width + c, width, last - whole, 1, False, c, means, constants, sums, largest)
    return (whole - first) // chain + last - whole


@inlined
def _runs(
    dy: Array, x: Array, check: Any, fine: Any, first: int, last: int, begin: int, end: int, length: int, chain: int,
    means: Array, constants: Array, sums: Array, largest: Array,
) -> int:  # fmt: skip
    """Add the places from `begin` to `end` of all runs of some images; how many chains that were, each lane."""
    channels = means.shape[1] // LANES
    whole = (end - begin) // LANES
    linked = whole // _ROWS * _ROWS
    for image in range(first, last):
        for c in range(channels):
            start, at = (image * channels + c) * length + begin, c * LANES
            rest = start + linked * LANES
            _step(dy, x, check, fine, start, LANES, linked, chain, False, at, means, constants, sums, largest)
            _step(dy, x, check, fine, rest, LANES, whole - linked, 1, False, at, means, constants, sums, largest)
            for index in range(start + whole * LANES, start + end - begin):
                _one(dy, x, check, fine, index, at, means, constants, sums, largest)
    return (linked // chain + whole - linked) * (last - first)


@kernel
def sums_of_rows(
    dy: Array, x: Array, check: Any, fine: Any, mean: Array, gradient: Array, deviation: Array, repeats: int,
    top: Array, words: Array,
) -> bool:  # fmt: skip
    """The words of rows of channels.

    Args:
        dy, x: flat.
        check: not None: look at the deviations too; otherwise the forward pass has shown that they fit.
        fine: not None: float64 data, with a second fold.
        mean: (C,), of x's dtype.
        gradient, deviation: (C,), the grid.
        repeats: how many rows are taken for one, so that vectors divide its width.
        top: empty, of the integers that are as wide as x's numbers.
        words: (W, C), receives the sums.

    Returns:
        Whether all values were finite and within their windows; if not, the words are worth nothing.
    """
    constants = _constants(gradient, deviation, repeats, 1)
    width = constants.shape[1]
    means = _means(mean, width, 1)
    folds = 1 if fine is None else 2
    sums, totals = lines(4, width, np.int64), lines(4 * folds, width, np.int64)
    largest = lines(2, width, top.dtype)
    rows = x.size // width
    chained = fine is None
    for first in range(0, rows, BLOCK):
        last = min(first + BLOCK, rows)
        chains = last - first
        if fine is None:  # noqa: SIM102 - by itself, so that Numba leaves out what float64 never does
            if chained:
                chains = _rows(dy, x, check, fine, first, last, _ROWS, means, constants, sums, largest)
                if not _chains_held(largest, gradient, 1):
                    chained = False
                    sums[:] = 0
        if not chained:
            chains = _rows(dy, x, check, fine, first, last, 1, means, constants, sums, largest)
        for c in range(width):
            fold(sums, constants, totals, c, chains, last - first)
    for c in range(x.size - rows * width):
        _one(dy, x, check, fine, rows * width + c, c, means, constants, sums, largest)
        fold(sums, constants, totals, c, 1, 1)
    gather(totals, words, 1)
    return _finish(largest, gradient, deviation, 1, words)


@kernel
def sums_of_runs(
    dy: Array, x: Array, check: Any, fine: Any, mean: Array, gradient: Array, deviation: Array, length: int,
    top: Array, words: Array,
) -> bool:  # fmt: skip
    """The words of runs of one channel after the other, each `length` long; otherwise as `sums_of_rows`."""
    constants = _constants(gradient, deviation, 1, LANES)
    width = constants.shape[1]
    channels = mean.size
    means = _means(mean, width, LANES)
    folds = 1 if fine is None else 2
    sums, totals = lines(4, width, np.int64), lines(4 * folds, width, np.int64)
    largest = lines(2, width, top.dtype)
    images = x.size // (channels * length)
    piece = min(length, (FOLD_EVERY - LANES) * LANES)
    chained = fine is None
    for begin in range(0, length, piece):
        end = min(begin + piece, length)
        whole, loose = (end - begin) // LANES, (end - begin) % LANES
        at_once = max(1, FOLD_EVERY // (whole + LANES))
        for first in range(0, images, at_once):
            last = min(first + at_once, images)
            chains = 0
            if fine is None:  # noqa: SIM102 - by itself, so that Numba leaves out what float64 never does
                if chained:
                    chains = _runs(
                        dy, x, check, fine, first, last, begin, end, length, _ROWS, means, constants, sums, largest
                    )
                    if not _chains_held(largest, gradient, LANES):
                        chained = False
                        sums[:] = 0
            if not chained:
                chains = _runs(dy, x, check, fine, first, last, begin, end, length, 1, means, constants, sums, largest)
            for at in range(width):
                more = loose * (last - first) if at % LANES == 0 else 0
                fold(sums, constants, totals, at, chains + more, whole * (last - first) + more)
    gather(totals, words, LANES)
    return _finish(largest, gradient, deviation, LANES, words)
