"""What the passes that sum have in common: where they keep their sums, and how those become words.

A pass has as many *places* as its data's rows are wide (or eight lanes a channel, for runs). What eight places need
lies in consecutive cache lines of one array, as int64:

    bits(M) of the first sum, bits(M) of the second, the first sum, the second; the same of the second fold, if there
    is one; whatever else the pass keeps

A sum begins as its bits(M). That of float32 data is a *chain*: a float64, M and the terms since the last fold, added
one after the other, which is exact for terms without ties while it keeps M's exponent (`bnlayer.limbs`). That of
float64 data is an integer: bit patterns, each term's added by itself.

Side by side the lines can't be in each other's way: an array for each would put them 4 KB apart at 512 channels, in the
same set of a first-level cache whose eight ways the rows of the batch take already, and a pass would take up to three
times as long, depending on where arrays happen to lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.jit import LINE, inlined
from bnlayer.kernels.compiled.simd import broadcast, load, number, store, upper
from bnlayer.kernels.compiled.vectors import LANES
from bnlayer.precision import SINGLE

Array = NDArray[Any]

# Terms between two folds: as many as the units of gradients leave room for, and fewer than 4^slack, for which those of
# deviations do while their squares hold. Integers, each below 2^52, have room for 2^11.
LONGEST = 2**SINGLE.gradient_slack
# By how much fewer they become where a chain of squares did not hold.
SHORTER = 4
# Elements ahead of which cache lines are asked for, a step's worth at a step: rows side by side are more streams than
# prefetchers follow, and a row of 128 channels is over before they have seen where it goes.
AHEAD = 8192
FLOATS_OF_LINE = LINE // 4
# What ties are broken by: see `bnlayer.limbs`.
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
def begin(accumulators: Array, height: int, folds: int) -> None:
    """Begin all sums anew."""
    for block in range(0, accumulators.size, height * LANES):
        for level in range(folds):
            for side in range(2):
                first = load(accumulators, block + magic(level, side) * LANES)
                store(accumulators, block + sums(level, side) * LANES, first)


@inlined
def discount(accumulators: Array, height: int, at: int) -> None:
    """Take from the sums of one place, of float64 data, the bits(M) of a term that came into it alone: see `fold`."""
    for level in range(2):
        for side in range(2):
            accumulators[where_is(at, sums(level, side), height)] -= accumulators[
                where_is(at, magic(level, side), height)
            ]


@inlined
def fold(accumulators: Array, height: int, folds: int, totals: Array, terms: int) -> None:
    """Bring all sums into the totals, and begin them anew.

    Args:
        accumulators, height: what the pass works on.
        totals: (4·folds, places): hi, lo of each fold of the first sum, then of the second.
        terms: how many bits(M) came into each sum since it began: none into chains.
    """
    width = totals.shape[1]
    low, held = broadcast(np.int64(_LOW)), broadcast(np.int64(terms + 1))
    for at in range(0, width, LANES):
        for level in range(folds):
            for side in range(2):
                index = at * height + sums(level, side) * LANES
                first = load(accumulators, at * height + magic(level, side) * LANES)
                total = load(accumulators, index) - held * first
                to = (2 * folds * side + 2 * level) * width + at
                store(totals, to, load(totals, to) + upper(total))
                store(totals, to + width, load(totals, to + width) + (total & low))
                store(accumulators, index, first)


@inlined
def part(length: int, begun: int, image: int, images: int, longest: int) -> tuple[int, int]:
    """How far to go through runs before a fold: to which place of them, and to which image.

    Args:
        length: of a run.
        begun, image: the place and the image where to begin.
        longest: the most terms for a lane.
    """
    left = (length - begun + LANES - 1) // LANES
    if left > longest:
        return begun + longest * LANES, image + 1
    if begun > 0:
        return length, image + 1
    return length, min(image + longest // left, images)


@inlined
def gather(totals: Array, lanes: int, repeats: int, limbs: Array) -> None:
    """Add up the places of each channel, carry, and write the canonical words."""
    channels = limbs.shape[1]
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
            limbs[row, c] = totals[row, c] + (lo >> 32)
            limbs[row + 1, c] = lo & _LOW
