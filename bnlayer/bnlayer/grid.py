"""The grids that all ranks share: what an integer of a sum is worth.

A grid is found by a **probe**, a global MAX of integers, and then kept for as long as the data fits it; the
ranks and the owner change it by these same pure functions of the same reduced limbs. It is part of a layer's
state: the last bits of a statistic depend on it, so runs are compared at equal history.

Shape suffixes: C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.fingerprint import digest
from bnlayer.precision import Precision, exponent_above, power_of_two, precision_of

# Version of the units and roundings that an exponent means: limbs of another release can't be added to these.
_UNITS = b"2"


def _fingerprint(*arrays: NDArray[np.generic]) -> int:
    """A 63-bit name of some arrays: equal grids have equal names on every machine."""
    parts = [np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes() for array in arrays]
    return int.from_bytes(digest(b"".join((_UNITS, *parts))), "little") >> 1


class _Fields:
    """A dataclass of whose instances copies and pickles take the fields, and not what was computed from them.

    That is computed when it is asked for, in whatever thread: a copy must not walk through it meanwhile.
    """

    def __getstate__(self: Any) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Grid(_Fields):
    """The forward grid: d = x − pivot, |d| < 2^exponent.

    Deviations are integers in units of u1 = 2^(exponent + slack − 51), squared deviations in units of
    u2 = 2^(2·exponent − 52).

    Attributes:
        dtype: the data's dtype, "float32" or "float64".
        pivot_C: float64; for float32 data a float32 number.
        exponent_C: int64.
        is_probed: whether a probe has found it.
    """

    dtype: str
    pivot_C: NDArray[np.float64]
    exponent_C: NDArray[np.int64]
    is_probed: bool

    @classmethod
    def unknown(cls, dtype: str, channels: int) -> Grid:
        """The grid before the first probe."""
        lowest = precision_of(dtype).lowest
        return cls(dtype, np.zeros(channels), np.full(channels, lowest, np.int64), False)

    @cached_property
    def precision(self) -> Precision:
        """The arithmetic of the data's dtype."""
        return precision_of(self.dtype)

    @cached_property
    def fingerprint(self) -> int:
        """The grid's name, sent with every contribution in its units."""
        return _fingerprint(self.pivot_C, self.exponent_C)

    @property
    def window_C(self) -> NDArray[np.float64]:
        """2^exponent: a deviation must lie below it."""
        return power_of_two(self.exponent_C)

    @cached_property
    def unit1_C(self) -> NDArray[np.float64]:
        """The unit of a deviation."""
        return power_of_two(self.exponent_C + self.precision.slack - 51)

    @cached_property
    def unit2_C(self) -> NDArray[np.float64]:
        """The unit of a squared deviation."""
        return power_of_two(2 * self.exponent_C - 52)

    @np.errstate(all="ignore")  # Inf and NaN are answers here, on the owner as on the ranks
    def probed(self, keys: NDArray[np.int64], need_C: NDArray[np.bool_]) -> Grid:
        """The grid after a probe.

            pivot = 0 if lo ≤ 0 ≤ hi, else (hi + lo)/2, rounded to the data's dtype
            exponent = frexp(max(hi − pivot, pivot − lo)) + room

        Values on both sides of 0, as a layer's inputs mostly are, are their own deviations: it takes the window a bit
        at most, and a kernel one subtraction less.

        Args:
            keys: (2, C) int64, the largest keys of x and of −x over all finite unmasked values.
            need_C: the channels that take a new grid; the others keep theirs.

        Returns:
            A probed grid; a channel without a value keeps its old one.
        """
        precision = self.precision
        hi, lo = precision.unkey(keys[0]), -precision.unkey(keys[1])
        new_C = need_C & (hi >= lo)
        hi, lo = np.where(new_C, hi, 0.0), np.where(new_C, lo, 0.0)
        # Halved before they are added, float64's largest numbers don't overflow; + 0.0 turns −0 into +0.
        middle = (hi / 2 + lo / 2).astype(precision.dtype).astype(np.float64) + 0.0
        pivot = np.where((lo <= 0.0) & (hi >= 0.0), 0.0, middle)
        half_range = np.maximum(hi - pivot, pivot - lo)
        wide = np.minimum(exponent_above(half_range, precision.lowest) + precision.room, precision.highest)
        exponent = np.where(half_range > 0, np.maximum(wide, precision.lowest), precision.lowest)
        return Grid(self.dtype, np.where(new_C, pivot, self.pivot_C), np.where(new_C, exponent, self.exponent_C), True)


@dataclass(frozen=True, eq=False)
class BackwardGrid(_Fields):
    """The backward grid: |dy| < 2^gradient, |x − p| < 2^deviation, with the p of the batch's statistics.

    Gradients are integers in units of 2^(gradient + slack − 51), their products with deviations in units of
    2^(gradient + slack + deviation − 51), with the precision's `gradient_slack`.

    What a layer keeps is the same for all its training calls, so that any of them can be pulled back, and so that an
    owner needs to know none of them: `reaching` makes of it the grid of one call.

    Attributes:
        dtype: the data's dtype.
        gradient_C: int64.
        deviation_C: int64; as it is kept, what masked values have asked for beyond the reach of their batch.
        is_probed: whether a probe has found `gradient_C`.
    """

    dtype: str
    gradient_C: NDArray[np.int64]
    deviation_C: NDArray[np.int64]
    is_probed: bool

    @classmethod
    def unknown(cls, dtype: str, channels: int) -> BackwardGrid:
        """The grid before the first probe."""
        lowest = np.full(channels, precision_of(dtype).lowest, np.int64)
        return cls(dtype, lowest, lowest, False)

    @cached_property
    def precision(self) -> Precision:
        """The arithmetic of the data's dtype."""
        return precision_of(self.dtype)

    @cached_property
    def fingerprint(self) -> int:
        """The name of the grid as it is kept, sent with every contribution in units that follow from it."""
        return _fingerprint(self.gradient_C, self.deviation_C)

    def reaching(self, reach_C: NDArray[np.int64]) -> BackwardGrid:
        """The grid whose deviations hold every unmasked |x − p| < 2^reach of the forward pass."""
        floor, ceiling = self.precision.deviation_floor, self.precision.deviation_ceiling
        # np.clip takes five times as long, at every backward pass.
        deviation = np.minimum(np.maximum(np.maximum(self.deviation_C, reach_C), floor), ceiling)
        return BackwardGrid(self.dtype, self.gradient_C, deviation, self.is_probed)

    def probed(self, exponents: NDArray[np.int64], need_C: NDArray[np.bool_]) -> BackwardGrid:
        """The grid after a probe.

        Args:
            exponents: (2, C) int64, the largest exponents of |dy| and of |x − p|, over finite values; of the second
                only those beyond the reach of the batch.
            need_C: the channels that take a new grid.
        """
        precision = self.precision
        # More room than forward: gradients shrink and grow faster than activations do.
        wide = np.clip(exponents[0] + precision.gradient_room, precision.lowest, precision.highest + 20)
        gradient = np.where(need_C & (exponents[0] > precision.lowest), wide, self.gradient_C)
        farthest = np.minimum(
            exponents[1], precision.deviation_ceiling
        )  # beyond it is a out_of_range: never a wrong sum
        deviation = np.where(need_C, np.maximum(self.deviation_C, farthest), self.deviation_C)
        return BackwardGrid(self.dtype, gradient, deviation, True)

    def renewed(self, changed_C: NDArray[np.bool_]) -> BackwardGrid:
        """What is left of it where the forward grid changed: raised deviations are forgotten."""
        deviation = np.where(changed_C, self.precision.lowest, self.deviation_C)
        return BackwardGrid(self.dtype, self.gradient_C, deviation, self.is_probed)
