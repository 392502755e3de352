"""The backward pass that reduces: exact sums of the output's gradients.

Per element, with |g| < 2^wA and |h| < 2^wX:

    g = float64(dy)     h = float64(x − mean)     A += bits(g + M_A) − bits(M_A)     B += bits(g·h + M_B) − bits(M_B)

where the two bits(M) are subtracted once, at the fold. Whether all fits is read off the largest |dy| and |x − mean|, as
integers in the order of the numbers: infinity and NaN are above every window. The latter is only looked at where the
forward pass has not shown it already.

Layouts, folds and arrays are those of `forward`; the sums here are A, B, and A, B of the second fold, and the largest
magnitudes are kept beside them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.forward import AHEAD, FOLD_EVERY, LINE, fold, gather, power
from bnlayer.kernels.compiled.jit import inlined, kernel
from bnlayer.kernels.compiled.simd import LANES, bits, greater, load, magnitude, number, prefetch, store, where, widen

Array = NDArray[Any]

# Rows at a step. Of 4 KB each, twice as many of both arrays would fight for the eight ways of one cache set.
_ROWS = 4


@inlined
def _constants(gradient: Array, deviation: Array, repeats: int, lanes: int) -> Array:
    """M_A, M_B, and those of the second fold; places as in `forward`."""
    channels = gradient.size
    width = channels * lanes * repeats
    constants = np.empty((4, width))
    for at in range(width):
        c = at // lanes % channels
        a, b = gradient[c], gradient[c] + deviation[c]
        constants[0, at] = 3.0 * power(a)
        constants[1, at] = 3.0 * power(b)
        constants[2, at] = 3.0 * power(max(a - 52, -1000))
        constants[3, at] = 3.0 * power(max(b - 52, -1000))
    return constants


@inlined
def _step(
    dy: Array, x: Array, check: Any, fine: Any, start: int, stride: int, steps: int, at: int, means: Array,
    constants: Array, sums: Array, largest: Array,
) -> None:  # fmt: skip
    """Add `steps` times eight elements, `stride` apart from `start` on, in the eight places from `at` on."""
    width = means.size
    mean, m_a, m_b = load(means, at), load(constants, at), load(constants, width + at)
    a, b = load(sums, at), load(sums, width + at)
    a_fine, b_fine = load(sums, 2 * width + at), load(sums, 3 * width + at)
    top_g, top_h = load(largest, at), load(largest, width + at)
    if stride > LANES and steps == _ROWS:
        for line in range(0, _ROWS * LANES, LINE):
            ahead = start + at * (_ROWS - 1) + AHEAD + line  # of the row's beginning + 4·at
            prefetch(x, ahead)
            prefetch(dy, ahead)
    for j in range(steps):
        gradient = load(dy, start + j * stride)
        deviation = load(x, start + j * stride) - mean
        size = magnitude(gradient)
        top_g = greater(top_g, size)
        if check is not None:
            deviation = where(size, deviation)  # what meets no gradient does not matter
            top_h = greater(top_h, magnitude(deviation))
        g = widen(gradient)
        product = g * widen(deviation)
        a = a + bits(g + m_a)
        b = b + bits(product + m_b)
        if fine is not None:
            m_a_fine, m_b_fine = load(constants, 2 * width + at), load(constants, 3 * width + at)
            a_fine = a_fine + bits(g - ((g + m_a) - m_a) + m_a_fine)
            b_fine = b_fine + bits(product - ((product + m_b) - m_b) + m_b_fine)
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
    deviation = x[index] - means[at]
    size = magnitude(gradient)
    largest[0, at] = max(largest[0, at], size)
    if check is not None:
        deviation = where(size, deviation)
        largest[1, at] = max(largest[1, at], magnitude(deviation))
    g = widen(gradient)
    product = g * widen(deviation)
    m_a, m_b = constants[0, at], constants[1, at]
    sums[0, at] += bits(g + m_a)
    sums[1, at] += bits(product + m_b)
    if fine is not None:
        sums[2, at] += bits(g - ((g + m_a) - m_a) + constants[2, at])
        sums[3, at] += bits(product - ((product + m_b) - m_b) + constants[3, at])


@inlined
def _finish(largest: Array, gradient: Array, deviation: Array, lanes: int, words: Array) -> bool:
    """Write the flags; whether all values were finite and within their windows."""
    channels = words.shape[1]
    fit = True
    for c in range(channels):
        words[-2, c] = 0
        words[-1, c] = 0
    for at in range(largest.shape[1]):
        c = at // lanes % channels
        top_g, top_h = widen(number(largest[0, at])), widen(number(largest[1, at]))
        fit &= top_g < power(gradient[c]) and top_h < power(deviation[c])
        words[-1, c] |= (np.int64(top_g >= power(gradient[c] - 20)) << 32) | np.int64(largest[0, at] > 0)
    return fit


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
    means = np.empty(width, x.dtype)
    for c in range(width):
        means[c] = mean[c % mean.size]
    folds = 1 if fine is None else 2
    sums, totals = np.zeros((4, width), np.int64), np.zeros((4 * folds, width), np.int64)
    largest = np.zeros((2, width), top.dtype)
    rows = x.size // width
    for first in range(0, rows, FOLD_EVERY):
        last = min(first + FOLD_EVERY, rows)
        whole = first + (last - first) // _ROWS * _ROWS
        for i in range(first, whole, _ROWS):
            for c in range(0, width, LANES):
                _step(dy, x, check, fine, i * width + c, width, _ROWS, c, means, constants, sums, largest)
        for c in range(0, width, LANES):
            _step(dy, x, check, fine, whole * width + c, width, last - whole, c, means, constants, sums, largest)
        for c in range(width):
            fold(sums, constants, totals, c, last - first)
    for c in range(x.size - rows * width):
        _one(dy, x, check, fine, rows * width + c, c, means, constants, sums, largest)
        fold(sums, constants, totals, c, 1)
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
    means = np.empty(width, x.dtype)
    for at in range(width):
        means[at] = mean[at // LANES]
    folds = 1 if fine is None else 2
    sums, totals = np.zeros((4, width), np.int64), np.zeros((4 * folds, width), np.int64)
    largest = np.zeros((2, width), top.dtype)
    images = x.size // (channels * length)
    piece = min(length, (FOLD_EVERY - LANES) * LANES)
    for begin in range(0, length, piece):
        end = min(begin + piece, length)
        whole = (end - begin) // LANES
        loose = end - begin - whole * LANES
        at_once = max(1, FOLD_EVERY // (whole + LANES))
        for first in range(0, images, at_once):
            last = min(first + at_once, images)
            for a in range(first, last):
                for c in range(channels):
                    start = (a * channels + c) * length + begin
                    at = c * LANES
                    _step(dy, x, check, fine, start, LANES, whole, at, means, constants, sums, largest)
                    for index in range(start + whole * LANES, start + end - begin):
                        _one(dy, x, check, fine, index, at, means, constants, sums, largest)
            for at in range(width):
                terms = whole + loose if at % LANES == 0 else whole
                fold(sums, constants, totals, at, terms * (last - first))
    gather(totals, words, LANES)
    return _finish(largest, gradient, deviation, LANES, words)
