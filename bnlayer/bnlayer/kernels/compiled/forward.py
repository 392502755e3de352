"""The forward pass that reduces: exact moments.

Each pass sees its data flat: as rows of a width that vectors divide, where the channels are the last axis, or as runs
of one channel after the other. Per element of float32 data:

    d = float64(x) − pivot        S += bits(d·(1 − 2^-53) + M1) − bits(M1)        T += bits(d·d + M2) − bits(M2)

with one rounding each (`fused`), and the two bits(M) subtracted once, at the fold. Neither can be a tie (see
`bnlayer.words`). So a term's rounding does not depend on what it is added to, as long as the last place of that is the
unit: **a few terms are added as floats, one after the other**, to M1 and M2 themselves, and only their sum becomes an
integer. The same integer, for half of the operations.

Such a chain of eight keeps its last place if the squares' sum stays below 4^w/8: then no partial sum of deviations
reaches 2^w either (Cauchy and Schwarz; M2's own 2^-10·4^w are the margin for the roundings). A sum that does not would
set one of the three bits below M2's exponent; the differences from M2's bits are OR-ed, and looked at once a block. A
block where one is set is added again, term by term, and so is the rest of the pass: values have grown since the probe
(a lone one may by a factor of 2.8), or eight lie at the very end of what it left them. Term by term, the exponent must
stay M2's: otherwise a value is not finite, or outside its window, or so near to its end that the reference has to tell.

float64 data have a second fold, for what the first one rounds away, and go term by term.

The sums S and T of a place, and the constants M1 and M2, lie as `folds` has them, then its pivot and, with a mask,
how many of its values counted.
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
    bits,
    broadcast,
    fused,
    load,
    load_truths,
    number,
    prefetch,
    store,
    where,
    widen,
)

Array = NDArray[Any]

# Rows at a step, and terms of a chain: the sums of eight channels are loaded and stored once for all of them.
_ROWS = 8
_SPLITTER = 134_217_729.0  # 2^27 + 1, as in `bnlayer.words`
_MARGIN = 2.0**-10  # of M2: it costs a window nothing but its last 2^-11


@inlined
def _places(pivot: Array, exponent: Array, repeats: int, lanes: int, folds: int, height: int) -> Array:
    """The places of a pass: each channel has `lanes` side by side, all of them `repeats` times over; sums are 0."""
    width = pivot.size * lanes * repeats
    places = lines((width + LANES - 1) // LANES * LANES * height)
    c = 0
    for at in range(width):
        w = exponent[c]
        places[where_is(at, magic(0, 0), height)] = bits(3.0 * power(w))
        places[where_is(at, magic(0, 1), height)] = bits(power(2 * w) * (1.0 + _MARGIN))
        if folds > 1:
            places[where_is(at, magic(1, 0), height)] = bits(3.0 * power(w - 52))
            places[where_is(at, magic(1, 1), height)] = bits(1.5 * power(2 * w - 51))
        places[where_is(at, 4 * folds, height)] = bits(pivot[c])
        c = channel_after(c, at, pivot.size, lanes)
    return places


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
def _below(odd: Array, bit: int) -> bool:
    """Whether no sum of squares differed from its M2 in that bit or a higher one."""
    seen = np.int64(0)
    for lane in range(odd.size):
        seen |= odd[lane]
    return bool(seen >> bit == 0)


@inlined
def _deviation(v: Any, centred: bool, pivot: Any) -> Any:
    """v − pivot; centred on 0 it is v itself."""
    return widen(v) if centred else widen(v) - pivot


@inlined
def _step(
    x: Array, starts: Any, mask: Any, fine: Any, first: int, stride: int, steps: int, chain: int, ahead: bool,
    centred: bool, at: int, places: Array, height: int, odd: Any,
) -> Any:  # fmt: skip
    """Add `steps` times eight elements in the eight places from `at` on, in chains; `odd` with what was seen.

    Args:
        first: the first element, from which the others are `stride` apart; with `starts`, the first row that counts.
        ahead: whether they are all of a step's rows: cache lines that come after them are asked for.
    """
    folds, block = 1 if fine is None else 2, at * height
    m1, m2 = number(load(places, block + magic(0, 0) * LANES)), number(load(places, block + magic(0, 1) * LANES))
    s, t = load(places, block + sums(0, 0) * LANES), load(places, block + sums(0, 1) * LANES)
    pivot, count = number(load(places, block + 4 * folds * LANES)), load(places, block + (height - 1) * LANES)
    last = folds - 1  # float32's only fold is not its fine one: what is loaded here goes unused then
    m1_fine = number(load(places, block + magic(last, 0) * LANES))
    m2_fine = number(load(places, block + magic(last, 1) * LANES))
    s_fine, t_fine = load(places, block + sums(last, 0) * LANES), load(places, block + sums(last, 1) * LANES)
    shrink = broadcast(SHRINK)
    if starts is None and ahead:
        for line in range(0, _ROWS * LANES, FLOATS_OF_LINE):
            prefetch(x, first + at * (_ROWS - 1) + AHEAD + line)  # of the row's beginning + 8·at
    for link in range(0, steps, chain):
        s_chain, t_chain = m1, m2
        for j in range(link, link + chain):
            index = first + j * stride if starts is None else starts[first + j] + at
            if starts is not None and ahead:
                prefetch(x, index + AHEAD)
            d = _deviation(load(x, index), centred, pivot)
            if mask is not None:
                truth = load_truths(mask, index)
                d = where(truth, d)
                count = count - truth
            if fine is None:
                s_chain = fused(d, shrink, s_chain)
                t_chain = fused(d, d, t_chain)
            else:
                square = d * d
                s_chain, t_chain = d + m1, square + m2
                s_fine = s_fine + bits(d - (s_chain - m1) + m1_fine)
                rest = (square - (t_chain - m2)) + _square_error(d, square, broadcast(_SPLITTER))
                t_fine = t_fine + bits(rest + m2_fine)
        s = s + bits(s_chain)
        t = t + bits(t_chain)
        odd = odd | (bits(t_chain) ^ bits(m2))
    store(places, block + sums(0, 0) * LANES, s)
    store(places, block + sums(0, 1) * LANES, t)
    if mask is not None:
        store(places, block + (height - 1) * LANES, count)
    if fine is not None:
        store(places, block + sums(1, 0) * LANES, s_fine)
        store(places, block + sums(1, 1) * LANES, t_fine)
    return odd


@inlined
def _one(x: Array, mask: Any, fine: Any, index: int, at: int, places: Array, height: int, odd: Array) -> None:
    """Add one element in one place."""
    folds = 1 if fine is None else 2
    d = widen(x[index]) - number(places[where_is(at, 4 * folds, height)])
    if mask is not None:
        d = d if mask[index] else 0.0
        places[where_is(at, height - 1, height)] += mask[index] != 0
    m1 = number(places[where_is(at, magic(0, 0), height)])
    m2 = number(places[where_is(at, magic(0, 1), height)])
    if fine is None:
        v, u = fused(d, SHRINK, m1), fused(d, d, m2)
    else:
        square = d * d
        v, u = d + m1, square + m2
        rest = (square - (u - m2)) + _square_error(d, square, _SPLITTER)
        m1_fine = number(places[where_is(at, magic(1, 0), height)])
        m2_fine = number(places[where_is(at, magic(1, 1), height)])
        places[where_is(at, sums(1, 0), height)] += bits(d - (v - m1) + m1_fine)
        places[where_is(at, sums(1, 1), height)] += bits(rest + m2_fine)
    places[where_is(at, sums(0, 0), height)] += bits(v)
    places[where_is(at, sums(0, 1), height)] += bits(u)
    odd[0] |= bits(u) ^ bits(m2)


@inlined
def _count(places: Array, height: int, mask: Any, count: Array) -> None:
    """Count what was not masked since the last time."""
    if mask is not None:
        for at in range(count.size):
            index = where_is(at, height - 1, height)
            count[at] += places[index]
            places[index] = 0


@inlined
def _begin_again(places: Array, height: int, mask: Any, folds: int, odd: Array) -> None:
    """Forget what was summed and counted since the last time."""
    forget(places, height, folds)
    if mask is not None:
        for first in range((height - 1) * LANES, places.size, height * LANES):
            places[first : first + LANES] = 0
    odd[:] = 0


@inlined
def _rows(
    x: Array, starts: Any, mask: Any, fine: Any, first: int, last: int, chain: int, centred: bool,
    width: int, places: Array, height: int, odd: Array,
) -> int:  # fmt: skip
    """Add the rows from `first` to `last`; how many chains that were, each place."""
    even = width // LANES * LANES
    whole = first + (last - first) // _ROWS * _ROWS
    seen = load(odd, 0)
    for i in range(first, whole, _ROWS):
        for c in range(0, even, LANES):
            at = i * width + c if starts is None else i
            seen = _step(x, starts, mask, fine, at, width, _ROWS, chain, True, centred, c, places, height, seen)
    for i in range(whole, last):
        for c in range(0, even, LANES):
            at = i * width + c if starts is None else i
            seen = _step(x, starts, mask, fine, at, width, 1, 1, False, centred, c, places, height, seen)
    store(odd, 0, seen)
    if starts is not None:
        for i in range(first, last):
            for c in range(even, width):
                _one(x, mask, fine, starts[i] + c, c, places, height, odd)
    return (whole - first) // chain + (last - whole)


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
    folds, width = 1 if fine is None else 2, pivot.size * repeats
    height = 4 * folds + (1 if mask is None else 2)
    places = _places(pivot, exponent, repeats, 1, folds, height)
    even = width // LANES * LANES
    totals = np.zeros((4 * folds, places.size // height), np.int64)
    count, odd = np.zeros(width, np.int64), np.zeros(LANES, np.int64)
    centred, chained = all_zero(pivot), fine is None
    rows = x.size // width if starts is None else starts.size
    for first in range(0, rows, BLOCK):
        last = min(first + BLOCK, rows)
        chains = last - first
        if fine is None:  # noqa: SIM102 - by itself, so that Numba leaves out what float64 never does
            if chained:
                if centred:
                    chains = _rows(x, starts, mask, fine, first, last, _ROWS, True, width, places, height, odd)
                else:
                    chains = _rows(x, starts, mask, fine, first, last, _ROWS, False, width, places, height, odd)
                if not _below(odd, 49):
                    chained = False
                    _begin_again(places, height, mask, folds, odd)
        if not chained:
            chains = _rows(x, starts, mask, fine, first, last, 1, False, width, places, height, odd)
        for c in range(even, width):
            discount(places, height, folds, c, last - first - chains, last - first - chains)
        fold(places, height, folds, totals, chains, chains)
        _count(places, height, mask, count)
    rest = x.size - rows * width if starts is None else 0
    for c in range(rest):
        _one(x, mask, fine, rows * width + c, c, places, height, odd)
        discount(places, height, folds, c, 1, 1)
    if rest:
        fold(places, height, folds, totals, 0, 0)
        _count(places, height, mask, count)
    gather(totals, 1, repeats, words)
    channels = words.shape[1]
    for c in range(channels):
        words[-2, c] = rows if starts is not None else x.size // channels
        words[-1, c] = 0
    if mask is not None:
        words[-2] = 0
        for c in range(channels):
            for at in range(c, width, channels):
                words[-2, c] += count[at]
    return _below(odd, 52)


@inlined
def _runs(
    x: Array, mask: Any, fine: Any, first: int, last: int, begin: int, end: int, length: int, chain: int,
    centred: bool, places: Array, height: int, odd: Array,
) -> int:  # fmt: skip
    """Add the places from `begin` to `end` of all runs of some images; how many chains that were, each lane."""
    channels = places.size // (LANES * height)
    whole = (end - begin) // LANES
    linked = whole // _ROWS * _ROWS
    seen = load(odd, 0)
    for image in range(first, last):
        for c in range(channels):
            start, at = (image * channels + c) * length + begin, c * LANES
            rest, loose = start + linked * LANES, whole - linked
            seen = _step(x, None, mask, fine, start, LANES, linked, chain, False, centred, at, places, height, seen)
            seen = _step(x, None, mask, fine, rest, LANES, loose, 1, False, centred, at, places, height, seen)
    store(odd, 0, seen)
    for image in range(first, last):
        for c in range(channels):
            start = (image * channels + c) * length
            for at in range(start + begin + whole * LANES, start + end):
                _one(x, mask, fine, at, c * LANES, places, height, odd)
    return (linked // chain + whole - linked) * (last - first)


@kernel
def moments_of_runs(x: Array, mask: Any, fine: Any, pivot: Array, exponent: Array, length: int, words: Array) -> bool:
    """The words of runs of one channel after the other, each `length` long; otherwise as `moments_of_rows`."""
    folds, channels = 1 if fine is None else 2, pivot.size
    width, height = channels * LANES, 4 * folds + (1 if mask is None else 2)
    places = _places(pivot, exponent, 1, LANES, folds, height)
    totals = np.zeros((4 * folds, places.size // height), np.int64)
    count, odd = np.zeros(width, np.int64), np.zeros(LANES, np.int64)
    centred, chained = all_zero(pivot), fine is None
    images = x.size // (channels * length)
    piece = min(length, (FOLD_EVERY - LANES) * LANES)
    for begin in range(0, length, piece):
        end = min(begin + piece, length)
        loose = (end - begin) % LANES
        at_once = max(1, FOLD_EVERY // ((end - begin) // LANES + LANES))
        for first in range(0, images, at_once):
            last = min(first + at_once, images)
            chains = 0
            if fine is None:  # noqa: SIM102 - by itself, so that Numba leaves out what float64 never does
                if chained:
                    if centred:
                        chains = _runs(x, mask, fine, first, last, begin, end, length, _ROWS, True, places, height, odd)
                    else:
                        chains = _runs(
                            x, mask, fine, first, last, begin, end, length, _ROWS, False, places, height, odd
                        )
                    if not _below(odd, 49):
                        chained = False
                        _begin_again(places, height, mask, folds, odd)
            if not chained:
                chains = _runs(x, mask, fine, first, last, begin, end, length, 1, False, places, height, odd)
            singles = loose * (last - first)
            for c in range(channels):
                discount(places, height, folds, c * LANES, singles, singles)
            fold(places, height, folds, totals, chains, chains)
            _count(places, height, mask, count)
    gather(totals, LANES, 1, words)
    for c in range(channels):
        words[-2, c] = images * length
        words[-1, c] = 0
    if mask is not None:
        words[-2] = 0
        for at in range(width):
            words[-2, at // LANES] += count[at]
    return _below(odd, 52)
