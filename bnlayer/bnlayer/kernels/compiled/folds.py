"""What the passes that sum have in common: where they keep their sums, and how those become words.

A pass has as many *places* as its data's rows are wide (or eight lanes a channel, for runs). What eight places need
lies in consecutive cache lines of one array, as int64:

    bits(M) of the first sum, bits(M) of the second, the first sum, the second; the same of the second fold, if there
    is one; whatever else the pass keeps

Sums are bit patterns, added up since they were last folded. Side by side the lines can't be in each other's way: an
array for each would put them 4 KB apart at 512 channels, in the same set of a first-level cache whose eight ways the
rows of the batch take already, and a pass would take up to three times as long, depending on where arrays happen to
lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.jit import LINE, inlined
from bnlayer.kernels.compiled.simd import LANES, broadcast, load, number, store, upper

Array = NDArray[Any]

# Terms are below 2^52, so that 2^11 of them stay below 2^63.
FOLD_EVERY = 2**11
# Rows after which the chains are looked at.
BLOCK = 2**10
# Elements ahead of which cache lines are asked for, a step's worth at a step: rows side by side are more streams than
# prefetchers follow, and a row of 128 channels is over before they have seen where it goes.
AHEAD = 8192
FLOATS_OF_LINE = LINE // 4
# What ties are broken by: see `bnlayer.words`.
SHRINK = 1.0 - 2.0**-53

_LOW = 0xFFFF_FFFF


@inlined
def power(exponent: int) -> Any:
    """2^exponent; infinity above float64's range, whose lower end no grid reaches."""
    return number(np.int64(min(exponent + 1023, 2047)) << 52)


@inlined
def all_zero(pivot: Array) -> bool:
    """Whether values are their own deviations, in all channels: a subtraction less for each."""
    centred = True
    for c in range(pivot.size):
        centred &= pivot[c] == 0.0
    return centred


@inlined
def channel_after(channel: int, at: int, channels: int, lanes: int) -> int:
    """Whose the place after `at` is: without a division where the channels come over and over."""
    if lanes > 1:
        return (at + 1) // lanes
    return channel + 1 if channel + 1 < channels else 0


@inlined
def magic(level: int, side: int) -> int:
    """The line of a bits(M): of a fold, and of the first sum or the second."""
    return 4 * level + side


@inlined
def sums(level: int, side: int) -> int:
    """The line of a sum."""
    return 4 * level + 2 + side


@inlined
def where_is(at: int, line: int, height: int) -> int:
    """The index of a place's entry in a line, in an array that has `height` lines for each eight places."""
    return (at // LANES * height + line) * LANES + at % LANES


@inlined
def discount(places: Array, height: int, folds: int, at: int, first: int, second: int) -> None:
    """Take from the sums of one place the bits(M) that were added to it alone, not to all places: see `fold`."""
    for level in range(folds):
        for side in range(2):
            terms = first if side == 0 else second
            places[where_is(at, sums(level, side), height)] -= terms * places[where_is(at, magic(level, side), height)]


@inlined
def fold(places: Array, height: int, folds: int, totals: Array, first: int, second: int) -> None:
    """Bring all sums into the totals, less the bits(M) that they hold, and begin them anew.

    Args:
        places, height: what the pass works on.
        totals: (4·folds, places): hi, lo of each fold of the first sum, then of the second.
        first, second: how many bits(M) were added to either since the last time: terms, or chains of them.
    """
    width = totals.shape[1]
    low, nothing = broadcast(np.int64(_LOW)), broadcast(np.int64(0))
    for at in range(0, width, LANES):
        for level in range(folds):
            for side in range(2):
                index = at * height + sums(level, side) * LANES
                terms = broadcast(np.int64(first if side == 0 else second))
                total = load(places, index) - terms * load(places, at * height + magic(level, side) * LANES)
                to = (2 * folds * side + 2 * level) * width + at
                store(totals, to, load(totals, to) + upper(total))
                store(totals, to + width, load(totals, to + width) + (total & low))
                store(places, index, nothing)


@inlined
def forget(places: Array, height: int, folds: int) -> None:
    """Set all sums to 0."""
    for block in range(0, places.size, height * LANES):
        for level in range(folds):
            for side in range(2):
                begin = block + sums(level, side) * LANES
                places[begin : begin + LANES] = 0


@inlined
def gather(totals: Array, lanes: int, repeats: int, words: Array) -> None:
    """Add up the places of each channel, carry, and write the canonical words."""
    channels = words.shape[1]
    once = channels * lanes
    for row in range(totals.shape[0]):
        for first in range(once, repeats * once, once):
            for at in range(once):
                totals[row, at] += totals[row, first + at]
        if lanes > 1:
            for c in range(channels):
                total = totals[row, c * lanes]
                for at in range(c * lanes + 1, (c + 1) * lanes):
                    total += totals[row, at]
                totals[row, c] = total
    for row in range(0, totals.shape[0], 2):
        for c in range(channels):
            lo = totals[row + 1, c]
            words[row, c] = totals[row, c] + (lo >> 32)
            words[row + 1, c] = lo & _LOW
