"""What the passes that sum have in common: how the integers of a pass become words.

Rows of the arrays that a pass works on, each as wide as the data's rows (or eight lanes a channel, for runs):

    magics    the M of the first sum, of the second, and those of the second fold
    sums      as many, as bit patterns that were added up since they were last folded
    totals    hi, lo of each fold of the first sum, then of the second
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.kernels.compiled.jit import LINE, inlined
from bnlayer.kernels.compiled.simd import bits, number

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
def repeated(places: Array, width: int) -> None:
    """Give all places what the first `width` have, over and over. (A division for each place takes longer.)"""
    for row in range(places.shape[0]):
        for at in range(width, places.shape[1]):
            places[row, at] = places[row, at - width]


@inlined
def fold(sums: Array, magics: Array, totals: Array, at: int, first: int, second: int) -> None:
    """Bring the sums of one place into its totals, less the bits(M) that they hold.

    Args:
        sums, magics: the first sum, the second, those of the second fold; a row of `magics` for each of `sums`.
        totals: hi, lo of each fold of the first sum, then of the second.
        at: the place.
        first, second: how many bits(M) were added to either since the last time: terms, or chains of them.
    """
    folds = totals.shape[0] // 4
    for level in range(folds):
        for side in range(2):
            row = 2 * level + side
            total = sums[row, at] - (first if side == 0 else second) * bits(magics[row, at])
            to = 2 * folds * side + 2 * level
            totals[to, at] += total >> 32
            totals[to + 1, at] += total & _LOW
            sums[row, at] = 0


@inlined
def gather(totals: Array, words: Array, lanes: int) -> None:
    """Add up the places of each channel, carry, and write the canonical words."""
    channels, width = words.shape[1], totals.shape[1]
    for row in range(0, totals.shape[0], 2):
        for c in range(channels):
            hi, lo = np.int64(0), np.int64(0)
            for first in range(c * lanes, width, channels * lanes):
                for at in range(first, first + lanes):
                    hi += totals[row, at]
                    lo += totals[row + 1, at]
            words[row, c] = hi + (lo >> 32)
            words[row + 1, c] = lo & _LOW
