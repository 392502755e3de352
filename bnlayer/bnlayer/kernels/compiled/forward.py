"""The forward pass that reduces: exact moments.

Each pass sees its data flat: as rows of a width that vectors divide, where the channels are the last axis, or as runs
of one channel after the other. Per element of float32 data:

    d = float64(x) − pivot        S += round(d·(1 − 2^-53), to 2^(w−46))        T += round(d·d, to 2^(2w−52))

with one rounding each (`fused`). Neither can be a tie (see `bnlayer.limbs`). So a term's rounding does not depend on
what it is added to, as long as the last place of that is the unit: **terms are added as floats, one after the other**,
to M1 = 3·2^(w+5) and M2 = 4^w themselves, and only the sum of some hundreds becomes an integer, that of the terms' own.

Such a chain keeps its last place while the squares' sum stays below 4^w, which M2's exponent shows afterwards: no
square is negative. Then no partial sum of 512 deviations reaches 2^(w+5) either (Cauchy and Schwarz). 512 terms hold if
they are as large as the largest that the probe saw. Where they have grown, the part since the last fold is added again
with shorter chains, and so is the rest of the pass; where a single term does not hold, it is not finite, or outside its
window, and the reference has to tell which.

float64 data have a second fold, for what the first one rounds away, and go term by term: each is rounded on M1 = 3·2^w
and M2 by itself, ties to even, and its bits are added.

The sums S and T of a place, and the constants M1 and M2, lie as `folds` has them, then its pivot and, with a mask,
how many of its values counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.double import add_deviation, add_deviations
from bnlayer.kernels.compiled.folds import (
    AHEAD,
    FLOATS_OF_LINE,
    LONGEST,
    SHORTER,
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
    fused,
    load,
    load_truths,
    number,
    prefetch,
    store,
    where,
    widen,
)
from bnlayer.kernels.compiled.vectors import LANES
from bnlayer.precision import SINGLE

Array = NDArray[Any]

# Rows at a step: the sums of eight channels are loaded and stored once for all of them.
_ROWS = 4
_SLACK = SINGLE.slack


@inlined
def _accumulators(pivot: Array, exponent: Array, repeats: int, lanes: int, folds: int, height: int) -> Array:
    """The places of a pass: each channel has `lanes` side by side, all of them `repeats` times over; sums are begun."""
    width = pivot.size * lanes * repeats
    accumulators = lines((width + LANES - 1) // LANES * LANES * height)
    c = 0
    for at in range(width):
        w = exponent[c]
        accumulators[where_is(at, magic(0, 0), height)] = bits(3.0 * power(w + _SLACK if folds == 1 else w))
        accumulators[where_is(at, magic(0, 1), height)] = bits(power(2 * w))
        if folds > 1:
            accumulators[where_is(at, magic(1, 0), height)] = bits(3.0 * power(w - 52))
            accumulators[where_is(at, magic(1, 1), height)] = bits(1.5 * power(2 * w - 51))
        accumulators[where_is(at, 4 * folds, height)] = bits(pivot[c])
        c = channel_after(c, at, pivot.size, lanes)
    begin(accumulators, height, folds)
    return accumulators


@inlined
def _deviation(v: Any, centred: bool, pivot: Any) -> Any:
    """v − pivot; centred on 0 it is v itself."""
    return widen(v) if centred else widen(v) - pivot


@inlined
def _added(
    x: Array, mask: Any, index: int, centred: bool, pivot: Any, shrink: Any, s: Any, t: Any, count: Any
) -> tuple[Any, Any, Any]:
    """Chains and counts with eight elements of float32 added."""
    d = _deviation(load(x, index), centred, pivot)
    if mask is not None:
        truth = load_truths(mask, index)
        d = where(truth, d)
        count = count - truth
    return fused(d, shrink, s), fused(d, d, t), count


@inlined
def _run(
    x: Array, mask: Any, start: int, steps: int, centred: bool, at: int, accumulators: Array, chains: Array, height: int
) -> None:
    """Add `steps` times eight elements of float32, side by side, in the eight places from `at` on.

    Each chain is four while it lasts, for one addition to begin before another has ended. They are put together
    exactly: their sums are whole units, and fit if the whole does.
    """
    block = at * height
    m1, m2 = load(chains, block + magic(0, 0) * LANES), load(chains, block + magic(0, 1) * LANES)
    s, t = load(chains, block + sums(0, 0) * LANES), load(chains, block + sums(0, 1) * LANES)
    pivot, count = load(chains, block + 4 * LANES), load(accumulators, block + (height - 1) * LANES)
    shrink = broadcast(SHRINK)
    s1, s2, s3, t1, t2, t3 = m1, m1, m1, m2, m2, m2
    whole = start + steps // 4 * 4 * LANES
    for index in range(start, whole, 4 * LANES):
        s, t, count = _added(x, mask, index, centred, pivot, shrink, s, t, count)
        s1, t1, count = _added(x, mask, index + LANES, centred, pivot, shrink, s1, t1, count)
        s2, t2, count = _added(x, mask, index + 2 * LANES, centred, pivot, shrink, s2, t2, count)
        s3, t3, count = _added(x, mask, index + 3 * LANES, centred, pivot, shrink, s3, t3, count)
    for index in range(whole, start + steps * LANES, LANES):
        s, t, count = _added(x, mask, index, centred, pivot, shrink, s, t, count)
    store(chains, block + sums(0, 0) * LANES, s + (s1 - m1) + (s2 - m1) + (s3 - m1))
    store(chains, block + sums(0, 1) * LANES, t + (t1 - m2) + (t2 - m2) + (t3 - m2))
    if mask is not None:
        store(accumulators, block + (height - 1) * LANES, count)


@inlined
def _step(
    x: Array, starts: Any, mask: Any, finer: Any, first: int, stride: int, steps: int, ahead: bool, centred: bool,
    at: int, accumulators: Array, chains: Array, height: int, odd: Any,
) -> Any:  # fmt: skip
    """Add `steps` times eight elements in the eight places from `at` on; `odd`, with what float64 data have shown.

    Args:
        first: the first element, from which the others are `stride` apart; with `starts`, the first row that counts.
        ahead: whether they are all of a step's rows: cache lines that come after them are asked for.
        chains: the places as float64.
    """
    block = at * height
    count = load(accumulators, block + (height - 1) * LANES)
    if starts is None and ahead:
        for line in range(0, _ROWS * LANES, FLOATS_OF_LINE):
            prefetch(x, first + at * (_ROWS - 1) + AHEAD + line)  # of the row's beginning + 4·at
    if finer is None:
        pivot, shrink = load(chains, block + 4 * LANES), broadcast(SHRINK)
        s, t = load(chains, block + sums(0, 0) * LANES), load(chains, block + sums(0, 1) * LANES)
        for j in range(steps):
            index = first + j * stride if starts is None else starts[first + j] + at
            if starts is not None and ahead:
                prefetch(x, index + AHEAD)
            s, t, count = _added(x, mask, index, centred, pivot, shrink, s, t, count)
        store(chains, block + sums(0, 0) * LANES, s)
        store(chains, block + sums(0, 1) * LANES, t)
    else:
        count, odd = add_deviations(x, starts, mask, first, stride, steps, at, accumulators, chains, height, count, odd)
    if mask is not None:
        store(accumulators, block + (height - 1) * LANES, count)
    return odd


@inlined
def _one(x: Array, mask: Any, finer: Any, index: int, at: int, accumulators: Array, height: int, odd: Array) -> None:
    """Add one element in one place."""
    folds = 1 if finer is None else 2
    d = widen(x[index]) - number(accumulators[where_is(at, 4 * folds, height)])
    if mask is not None:
        d = d if mask[index] else 0.0
        accumulators[where_is(at, height - 1, height)] += mask[index] != 0
    if finer is None:
        to_s, to_t = where_is(at, sums(0, 0), height), where_is(at, sums(0, 1), height)
        accumulators[to_s] = bits(fused(d, SHRINK, number(accumulators[to_s])))
        accumulators[to_t] = bits(fused(d, d, number(accumulators[to_t])))
    else:
        add_deviation(d, at, accumulators, height, odd)


@inlined
def _held(accumulators: Array, height: int, finer: Any, odd: Array) -> bool:
    """Whether squares have kept the exponents of their M2: the sums of chains, or each by itself."""
    if finer is None:
        seen = broadcast(np.int64(0))
        for block in range(0, accumulators.size, height * LANES):
            seen = seen | (
                load(accumulators, block + sums(0, 1) * LANES) ^ load(accumulators, block + magic(0, 1) * LANES)
            )
        store(odd, 0, seen)
    differing = np.int64(0)
    for lane in range(LANES):
        differing |= odd[lane]
    return bool(differing >> 52 == 0)


@inlined
def _count(accumulators: Array, height: int, mask: Any, count: Array) -> None:
    """Count what was not masked since the last time."""
    if mask is not None:
        for at in range(count.size):
            index = where_is(at, height - 1, height)
            count[at] += accumulators[index]
            accumulators[index] = 0


@inlined
def _begin_again(accumulators: Array, height: int, mask: Any, folds: int) -> None:
    """Forget what was summed and counted since the last fold."""
    begin(accumulators, height, folds)
    if mask is not None:
        for first in range((height - 1) * LANES, accumulators.size, height * LANES):
            accumulators[first : first + LANES] = 0


@inlined
def _settled(
    accumulators: Array, height: int, mask: Any, finer: Any, odd: Array, totals: Array, count: Array, terms: int
) -> bool:
    """Fold what was added since the last time, if it held, or forget it; whether it did.

    Args:
        terms: how many there were for each place.
    """
    folds = 1 if finer is None else 2
    held = _held(accumulators, height, finer, odd)
    if held:
        fold(accumulators, height, folds, totals, 0 if finer is None else terms)
        _count(accumulators, height, mask, count)
    else:
        _begin_again(accumulators, height, mask, folds)
    return held


@inlined
def _rows(
    x: Array, starts: Any, mask: Any, finer: Any, first: int, last: int, centred: bool, width: int, accumulators: Array,
    chains: Array, height: int, odd: Array,
) -> None:  # fmt: skip
    """Add the rows from `first` to `last`."""
    even = width // LANES * LANES
    whole = first + (last - first) // _ROWS * _ROWS
    seen = load(odd, 0)
    for i in range(first, whole, _ROWS):
        for c in range(0, even, LANES):
            at = i * width + c if starts is None else i
            seen = _step(x, starts, mask, finer, at, width, _ROWS, True, centred, c, accumulators, chains, height, seen)
    for c in range(0, even, LANES):
        at = whole * width + c if starts is None else whole
        left = last - whole
        seen = _step(x, starts, mask, finer, at, width, left, False, centred, c, accumulators, chains, height, seen)
    store(odd, 0, seen)
    if starts is not None:
        for i in range(first, last):
            for c in range(even, width):
                _one(x, mask, finer, starts[i] + c, c, accumulators, height, odd)


@kernel
def moments_of_rows(
    x: Array, starts: Any, mask: Any, finer: Any, pivot: Array, exponent: Array, repeats: int, limbs: Array
) -> bool:
    """The words of rows of channels.

    Args:
        x: flat.
        starts: where the rows that count begin, of any width; None: all of them, one after the other.
        mask: flat, of x's size, 0 where an element does not count; None: all do.
        finer: not None: float64 data, with a second fold.
        pivot, exponent: (C,), the grid.
        repeats: how many rows are taken for one, so that vectors divide its width; 1 with `starts`.
        limbs: (W, C), receives the moments; no flag is raised.

    Returns:
        Whether all values were finite and within the window; if not, the words are worth nothing.
    """
    folds, width = 1 if finer is None else 2, pivot.size * repeats
    height = 4 * folds + (1 if mask is None else 2)
    accumulators = _accumulators(pivot, exponent, repeats, 1, folds, height)
    chains = accumulators.view(np.float64)
    totals = np.zeros((4 * folds, accumulators.size // height), np.int64)
    count, odd = np.zeros(width, np.int64), np.zeros(LANES, np.int64)
    centred, longest, first = all_zero(pivot), LONGEST, 0
    rows = x.size // width if starts is None else starts.size
    while first < rows:
        last = min(first + longest, rows)
        if centred:
            _rows(x, starts, mask, finer, first, last, True, width, accumulators, chains, height, odd)
        else:
            _rows(x, starts, mask, finer, first, last, False, width, accumulators, chains, height, odd)
        if _settled(accumulators, height, mask, finer, odd, totals, count, last - first):
            first = last
        elif longest == 1 or finer is not None:
            return False
        else:
            longest = max(longest // SHORTER, 1)
    rest = x.size - rows * width if starts is None else 0
    for c in range(rest):
        _one(x, mask, finer, rows * width + c, c, accumulators, height, odd)
        if finer is not None:
            discount(accumulators, height, c)
    if rest and not _settled(accumulators, height, mask, finer, odd, totals, count, 0):
        return False
    gather(totals, 1, repeats, limbs)
    channels = limbs.shape[1]
    for c in range(channels):
        limbs[-2, c] = rows if starts is not None else x.size // channels
        limbs[-1, c] = 0
    if mask is not None:
        limbs[-2] = 0
        for c in range(channels):
            for at in range(c, width, channels):
                limbs[-2, c] += count[at]
    return True


@inlined
def _runs(
    x: Array, mask: Any, finer: Any, first: int, last: int, begun: int, end: int, length: int, centred: bool,
    accumulators: Array, chains: Array, height: int, odd: Array,
) -> None:  # fmt: skip
    """Add the places from `begun` to `end` of all runs of some images."""
    channels = accumulators.size // (LANES * height)
    whole = (end - begun) // LANES
    seen = load(odd, 0)
    for image in range(first, last):
        for c in range(channels):
            start, at = (image * channels + c) * length + begun, c * LANES
            if finer is None:
                _run(x, mask, start, whole, centred, at, accumulators, chains, height)
            else:
                seen = _step(
                    x, None, mask, finer, start, LANES, whole, False, centred, at, accumulators, chains, height, seen
                )
    store(odd, 0, seen)
    for image in range(first, last):
        for c in range(channels):
            rest = (image * channels + c) * length + begun + whole * LANES
            for lane in range((end - begun) % LANES):
                _one(x, mask, finer, rest + lane, c * LANES + lane, accumulators, height, odd)
                if finer is not None:
                    discount(accumulators, height, c * LANES + lane)


@kernel
def moments_of_runs(x: Array, mask: Any, finer: Any, pivot: Array, exponent: Array, length: int, limbs: Array) -> bool:
    """The words of runs of one channel after the other, each `length` long; otherwise as `moments_of_rows`."""
    folds, channels = 1 if finer is None else 2, pivot.size
    width, height = channels * LANES, 4 * folds + (1 if mask is None else 2)
    accumulators = _accumulators(pivot, exponent, 1, LANES, folds, height)
    chains = accumulators.view(np.float64)
    totals = np.zeros((4 * folds, accumulators.size // height), np.int64)
    count, odd = np.zeros(width, np.int64), np.zeros(LANES, np.int64)
    centred, longest, first, begun = all_zero(pivot), LONGEST, 0, 0
    images = x.size // (channels * length)
    while first < images:
        end, last = part(length, begun, first, images, longest)
        if centred:
            _runs(x, mask, finer, first, last, begun, end, length, True, accumulators, chains, height, odd)
        else:
            _runs(x, mask, finer, first, last, begun, end, length, False, accumulators, chains, height, odd)
        terms = (end - begun) // LANES * (last - first)
        if _settled(accumulators, height, mask, finer, odd, totals, count, terms):
            first, begun = (last, 0) if end == length else (first, end)
        elif longest == 1 or finer is not None:
            return False
        else:
            longest = max(longest // SHORTER, 1)
    gather(totals, LANES, 1, limbs)
    for c in range(channels):
        limbs[-2, c] = images * length
        limbs[-1, c] = 0
    if mask is not None:
        limbs[-2] = 0
        for at in range(width):
            limbs[-2, at // LANES] += count[at]
    return True
