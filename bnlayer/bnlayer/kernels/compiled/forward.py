"""The forward passes: exact moments, and normalizing.

Each pass sees its data flat: as rows of a width that vectors divide, where the channels are the last axis, or as runs
of one channel after the other. Per element:

    d = float64(x) − pivot        S += bits(d + M1) − bits(M1)        T += bits(d·d + M2) − bits(M2)

where the two bits(M) are subtracted once, at the fold. All T terms fit their window, and are finite, if and only if
the OR of their bit patterns still has the exponent of M2: a greater one would set a bit above it. float64 data have a
second fold, for what the first one rounds away.

Rows of the arrays that a pass works on, each as wide as the data's rows (or eight lanes a channel, for runs):

    constants   M1, M2, those of the second fold, and the pivot
    sums        S, T, those of the second fold, and the OR; the first four since they were last folded
    totals      hi, lo of each fold of S, then of T
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.jit import inlined, kernel
from bnlayer.kernels.compiled.simd import (
    LANES,
    bits,
    broadcast,
    load,
    load_truths,
    number,
    prefetch,
    store,
    where,
    widen,
)

Array = NDArray[Any]

# Terms are below 2^52, so that 2^11 of them stay below 2^63.
FOLD_EVERY = 2**11
# Rows at a step: the sums of eight channels are loaded and stored once for all of them.
_ROWS = 8
# Elements ahead of which cache lines are asked for, a step's worth at a step: rows side by side are more streams than
# prefetchers follow, and a row of 128 channels is over before they have seen where it goes.
AHEAD = 4096
LINE = 16  # elements of float32 in a cache line

_LOW = 0xFFFF_FFFF
_SPLITTER = 134_217_729.0  # 2^27 + 1, as in `bnlayer.words`
_M1, _M2, _M1_FINE, _M2_FINE, _PIVOT = range(5)
_S, _T, _S_FINE, _T_FINE, _SEEN = range(5)


@inlined
def power(exponent: int) -> Any:
    """2^exponent; infinity above float64's range, whose lower end no grid reaches."""
    return number(np.int64(min(exponent + 1023, 2047)) << 52)


@inlined
def _constants(pivot: Array, exponent: Array, repeats: int, lanes: int) -> Array:
    """The constants, each channel's in `lanes` places side by side, all of them `repeats` times over."""
    channels = pivot.size
    width = channels * lanes * repeats
    constants = np.empty((5, width))
    for at in range(width):
        c = at // lanes % channels
        w = exponent[c]
        constants[_PIVOT, at] = pivot[c]
        constants[_M1, at] = 3.0 * power(w)
        constants[_M2, at] = power(2 * w)
        constants[_M1_FINE, at] = 3.0 * power(w - 52)
        constants[_M2_FINE, at] = 1.5 * power(2 * w - 51)
    return constants


@inlined
def _split(v: Any, splitter: Any) -> Any:
    """The upper half of v's digits; the rest is v less that."""
    big = splitter * v
    return big - (big - v)


@inlined
def _square_error(d: Any, square: Any, splitter: Any) -> Any:
    """d·d − float64(d·d), operation by operation that of `bnlayer.words.product_error`."""
    hi = _split(d, splitter)
    lo = d - hi
    return lo * lo - (((square - hi * hi) - lo * hi) - hi * lo)


@inlined
def fold(sums: Array, magics: Array, totals: Array, at: int, terms: int) -> None:
    """Bring the sums of one place into its totals, less the bits(M) of its terms.

    Args:
        sums, magics: the first sum, the second, and so on; a row of `magics` for each of `sums`.
        totals: hi, lo of each fold of the first sum, then of the second.
        at: the place.
        terms: how many were added since the last time.
    """
    folds = totals.shape[0] // 4
    for level in range(folds):
        for side in range(2):
            row = 2 * level + side
            total = sums[row, at] - terms * bits(magics[row, at])
            to = 2 * folds * side + 2 * level
            totals[to, at] += total >> 32
            totals[to + 1, at] += total & _LOW
            sums[row, at] = 0


@inlined
def gather(totals: Array, words: Array, lanes: int) -> None:
    """Add up the places of each channel, carry, and write the canonical words."""
    channels = words.shape[1]
    for row in range(0, totals.shape[0], 2):
        for c in range(channels):
            words[row, c] = 0
            words[row + 1, c] = 0
        for at in range(totals.shape[1]):
            c = at // lanes % channels
            words[row, c] += totals[row, at]
            words[row + 1, c] += totals[row + 1, at]
        for c in range(channels):
            words[row, c] += words[row + 1, c] >> 32
            words[row + 1, c] &= _LOW


@inlined
def _all_fit(sums: Array, exponent: Array, lanes: int) -> bool:
    """Whether every square was finite, and below its channel's window."""
    fit = True
    for at in range(sums.shape[1]):
        c = at // lanes % exponent.size
        fit &= sums[_SEEN, at] >> 52 == 1023 + 2 * exponent[c]
    return fit


@inlined
def _step(
    x: Array, starts: Any, mask: Any, fine: Any, i: int, rows: int, c: int, constants: Array, sums: Array, count: Array
) -> None:
    """Add `rows` rows from row i on, in the eight places from c on."""
    width = constants.shape[1]
    pivot, m1, m2 = load(constants, _PIVOT * width + c), load(constants, c), load(constants, _M2 * width + c)
    s, t, seen = load(sums, c), load(sums, _T * width + c), load(sums, _SEEN * width + c)
    if starts is None and rows == _ROWS:
        for line in range(0, _ROWS * LANES, LINE):
            prefetch(x, i * width + c * _ROWS + AHEAD + line)
    for j in range(i, i + rows):
        start = j * width if starts is None else starts[j]
        d = widen(load(x, start + c)) - pivot
        if mask is not None:
            truth = load_truths(mask, start + c)
            d = where(truth, d)
            store(count, c, load(count, c) - truth)
        square = d * d
        s = s + bits(d + m1)
        u = bits(square + m2)
        t = t + u
        seen = seen | u
        if fine is not None:
            splitter = broadcast(_SPLITTER)
            m1_fine, m2_fine = load(constants, _M1_FINE * width + c), load(constants, _M2_FINE * width + c)
            rest = d - ((d + m1) - m1)
            rest_of_square = (square - ((square + m2) - m2)) + _square_error(d, square, splitter)
            at, to = _S_FINE * width + c, _T_FINE * width + c
            store(sums, at, load(sums, at) + bits(rest + m1_fine))
            store(sums, to, load(sums, to) + bits(rest_of_square + m2_fine))
    store(sums, c, s)
    store(sums, _T * width + c, t)
    store(sums, _SEEN * width + c, seen)


@inlined
def _one(x: Array, mask: Any, fine: Any, at: int, c: int, constants: Array, sums: Array, count: Array) -> None:
    """Add one element in place c."""
    d = widen(x[at]) - constants[_PIVOT, c]
    if mask is not None:
        d = d if mask[at] else 0.0
        count[c] += mask[at] != 0
    m1, m2 = constants[_M1, c], constants[_M2, c]
    square = d * d
    u = bits(square + m2)
    sums[_S, c] += bits(d + m1)
    sums[_T, c] += u
    sums[_SEEN, c] |= u
    if fine is not None:
        rest = d - ((d + m1) - m1)
        rest_of_square = (square - ((square + m2) - m2)) + _square_error(d, square, _SPLITTER)
        sums[_S_FINE, c] += bits(rest + constants[_M1_FINE, c])
        sums[_T_FINE, c] += bits(rest_of_square + constants[_M2_FINE, c])


@kernel
def moments_of_rows(
    x: Array, starts: Any, mask: Any, fine: Any, pivot: Array, exponent: Array, repeats: int, words: Array
) -> bool:
    """The words of rows of channels.

    Args:
        x: flat.
        starts: where the rows that count begin, of any width; None: all of them, one after the other.
        mask: flat, of x's size, 0 where an element does not count; None: all do.
        fine: not None: float64 data, with a second fold.
        pivot, exponent: (C,), the grid.
        repeats: how many rows are taken for one, so that vectors divide its width; 1 with `starts`.
        words: (W, C), receives the moments; no flag is raised.

    Returns:
        Whether all values were finite and within the window; if not, the words are worth nothing.
    """
    folds = 1 if fine is None else 2
    constants = _constants(pivot, exponent, repeats, 1)
    width = constants.shape[1]
    sums, totals = np.zeros((5, width), np.int64), np.zeros((4 * folds, width), np.int64)
    count = np.zeros(width, np.int64)
    for c in range(width):
        sums[_SEEN, c] = bits(constants[_M2, c])
    rows = x.size // width if starts is None else starts.size
    even = width // LANES * LANES
    for first in range(0, rows, FOLD_EVERY):
        last = min(first + FOLD_EVERY, rows)
        whole = first + (last - first) // _ROWS * _ROWS
        for i in range(first, whole, _ROWS):
            for c in range(0, even, LANES):
                _step(x, starts, mask, fine, i, _ROWS, c, constants, sums, count)
        for i in range(whole, last):
            for c in range(0, even, LANES):
                _step(x, starts, mask, fine, i, 1, c, constants, sums, count)
        if starts is not None:
            for i in range(first, last):
                for c in range(even, width):
                    _one(x, mask, fine, starts[i] + c, c, constants, sums, count)
        for c in range(width):
            fold(sums, constants, totals, c, last - first)
    rest = x.size - rows * width if starts is None else 0
    for c in range(rest):
        _one(x, mask, fine, rows * width + c, c, constants, sums, count)
        fold(sums, constants, totals, c, 1)
    gather(totals, words, 1)
    channels = words.shape[1]
    for c in range(channels):
        words[-2, c] = rows if starts is not None else x.size // channels
        words[-1, c] = 0
    if mask is not None:
        words[-2] = 0
        for c in range(width):
            words[-2, c % channels] += count[c]
    return _all_fit(sums, exponent, 1)


@kernel
def moments_of_runs(x: Array, mask: Any, fine: Any, pivot: Array, exponent: Array, length: int, words: Array) -> bool:
    """The words of runs of one channel after the other, each `length` long; otherwise as `moments_of_rows`."""
    folds, channels = 1 if fine is None else 2, pivot.size
    constants = _constants(pivot, exponent, 1, LANES)
    width = constants.shape[1]
    sums, totals = np.zeros((5, width), np.int64), np.zeros((4 * folds, width), np.int64)
    count = np.zeros(width, np.int64)
    for at in range(width):
        sums[_SEEN, at] = bits(constants[_M2, at])
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
                    _run(x, mask, fine, start, whole, c * LANES, constants, sums, count)
                    for at in range(start + whole * LANES, start + end - begin):
                        _one(x, mask, fine, at, c * LANES, constants, sums, count)
            for at in range(width):
                terms = whole + loose if at % LANES == 0 else whole
                fold(sums, constants, totals, at, terms * (last - first))
    gather(totals, words, LANES)
    for c in range(channels):
        words[-2, c] = images * length
        words[-1, c] = 0
    if mask is not None:
        words[-2] = 0
        for at in range(width):
            words[-2, at // LANES] += count[at]
    return _all_fit(sums, exponent, LANES)


@inlined
def _run(
    x: Array, mask: Any, fine: Any, start: int, steps: int, at: int, constants: Array, sums: Array, count: Array
) -> None:
    """Add a run of 8·steps elements in the eight lanes of a channel."""
    width = constants.shape[1]
    pivot, m1, m2 = load(constants, _PIVOT * width + at), load(constants, at), load(constants, _M2 * width + at)
    s, t, seen = load(sums, at), load(sums, _T * width + at), load(sums, _SEEN * width + at)
    n = load(count, at)
    s_fine, t_fine = load(sums, _S_FINE * width + at), load(sums, _T_FINE * width + at)
    for j in range(steps):
        d = widen(load(x, start + j * LANES)) - pivot
        if mask is not None:
            truth = load_truths(mask, start + j * LANES)
            d = where(truth, d)
            n = n - truth
        square = d * d
        s = s + bits(d + m1)
        u = bits(square + m2)
        t = t + u
        seen = seen | u
        if fine is not None:
            rest = d - ((d + m1) - m1)
            error = _square_error(d, square, broadcast(_SPLITTER))
            s_fine = s_fine + bits(rest + load(constants, _M1_FINE * width + at))
            t_fine = t_fine + bits((square - ((square + m2) - m2)) + error + load(constants, _M2_FINE * width + at))
    store(sums, at, s)
    store(sums, _T * width + at, t)
    store(sums, _SEEN * width + at, seen)
    if mask is not None:
        store(count, at, n)
    if fine is not None:
        store(sums, _S_FINE * width + at, s_fine)
        store(sums, _T_FINE * width + at, t_fine)
