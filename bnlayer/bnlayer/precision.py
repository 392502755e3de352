"""The two arithmetics of exact sums: float32 data on one grid, float64 data on two.

A window exponent w bounds the data of a channel: |x − pivot| < 2^w. It lies in [lowest, highest], so that
every unit of the grid, down to the second fold of a squared deviation, is a normal or subnormal float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


@dataclass(frozen=True, slots=True)
class Precision:
    """Constants of one arithmetic.

    Attributes:
        name: NumPy's name of the data's dtype.
        dtype: the data's dtype.
        folds: grids per sum: the second one takes what the first one rounds away.
        lowest: window exponent that says "no range": a constant channel, or no data yet.
        highest: largest window exponent.
        deviation_floor: smallest window exponent of |x − mean| in a backward pass.
        deviation_ceiling: largest one. Values that are not masked lie below it; with the largest window of a gradient
            (20 above `highest`) the magic number of their products is finite.
        room: bits by which a probe makes a window wider than what it saw.
        slack: bits by which the unit of deviations is coarser than the window needs: sums of many have room beside it.
        gradient_room, gradient_slack: the same of a backward pass.
        gradient_span: bits below a window's end at which it has become too coarse for gradients that have shrunk.
        epsilon: one unit in the last place of 1, which bounds the rounding of the mean.
        sign: mask that turns the negative numbers' bits into an ordered integer.
    """

    name: str
    dtype: np.dtype[Any]
    folds: int
    lowest: int
    highest: int
    deviation_floor: int
    deviation_ceiling: int
    room: int
    slack: int
    gradient_room: int
    gradient_slack: int
    gradient_span: int
    epsilon: float
    sign: int

    def key(self, x: NDArray[Any]) -> NDArray[np.int64]:
        """Integers in the order of the floats (−0 < +0), so that a MAX of integers finds the largest float."""
        bits = x.view(np.int32 if self.folds == 1 else np.int64).astype(np.int64)
        return bits ^ ((bits >> 63) & self.sign)

    def unkey(self, keys: NDArray[np.int64]) -> NDArray[np.float64]:
        """The floats, as float64, whose keys these are."""
        bits = keys ^ ((keys >> 63) & self.sign)
        return bits.astype(np.int32 if self.folds == 1 else np.int64).view(self.dtype).astype(np.float64)

    @property
    def no_key(self) -> int:
        """The key of −Inf: what a shard without a finite unmasked value contributes to a probe."""
        return int(self.key(np.array([-np.inf], self.dtype))[0])


SINGLE = Precision(
    name="float32", dtype=np.dtype(np.float32), folds=1, lowest=-160, highest=126, deviation_floor=-148,
    deviation_ceiling=130, room=5, slack=5, gradient_room=8, gradient_slack=9, gradient_span=20, epsilon=2.0**-23,
    sign=0x7FFF_FFFF,
)  # fmt: skip
DOUBLE = Precision(
    name="float64", dtype=np.dtype(np.float64), folds=2, lowest=-480, highest=500, deviation_floor=-480,
    deviation_ceiling=501, room=3, slack=0, gradient_room=8, gradient_slack=0, gradient_span=20, epsilon=2.0**-52,
    sign=0x7FFF_FFFF_FFFF_FFFF,
)  # fmt: skip


# Asked several times in an exchange, and NumPy computes a dtype's name anew each time.
_OF: dict[str | np.dtype[Any], Precision] = {}
for _precision in (SINGLE, DOUBLE):
    _OF |= {_precision.name: _precision, np.dtype(_precision.name): _precision}


def precision_of(dtype: DTypeLike) -> Precision:
    """The arithmetic for data of a dtype.

    Raises:
        ValueError: the dtype is neither float32 nor float64.
    """
    if isinstance(dtype, str | np.dtype) and dtype in _OF:
        return _OF[dtype]
    name = np.dtype(dtype).name
    if name in _OF:
        return _OF[name]
    raise ValueError(f"Expected float32 or float64 for the arithmetic, received {name}.")


def power_of_two(exponent: NDArray[np.int64]) -> NDArray[np.float64]:
    """2^exponent, exactly. (exp2, log2 and power belong to libm, and differ between machines.)"""
    return np.ldexp(1.0, exponent)


def exponent_above(a: NDArray[np.float64], none: int) -> NDArray[np.int64]:
    """The e with a < 2^e ≤ 2a, and `none` where a = 0."""
    return np.where(a > 0, np.frexp(a)[1], none).astype(np.int64)
