"""Exact totals of rows, as Python's integers, and the arrays as which they travel.

Σx is kept in units of 2^-1074 and Σx² in units of 2^-2148, in which every float64 is a whole number: nothing is rounded
before the result is, once.

Shape suffixes: R rows, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.fingerprint import digest
from bnlayer.limbs import product_error
from bnlayer.plain import plain_array

if TYPE_CHECKING:
    from fractions import Fraction

_UNIT = 1074  # every float64 is a whole number of 2^-1074, its square one of 2^-2148
_DIGIT = 32  # bits of a digit in which integers are saved and sent: the sum of 2^31 ranks' digits fits int64
_FOLD = 30  # bits that are taken of all values at once; sums of 2^32 rows fit int64
_SMALLEST = -450  # exponent below the largest value's, under which the error of a square could underflow
_ROWS = 2**14  # at a time: their temporaries fit a cache

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Totals:
    """Exact totals, one entry a channel.

    Attributes:
        count: N.
        sums: Σx, in units of 2^-1074.
        squares: Σx², in units of 2^-2148.
        nonfinite: whether a value was NaN or infinite; it is in neither sum.
    """

    count: list[int]
    sums: list[int]
    squares: list[int]
    nonfinite: list[bool]

    @classmethod
    def zero(cls, channels: int) -> Totals:
        """Of no rows."""
        return cls([0] * channels, [0] * channels, [0] * channels, [False] * channels)

    @classmethod
    def of(cls, x_RC: Array, live_RC: NDArray[np.bool_] | None) -> Totals:
        """The totals of rows; of the live values where it is given."""
        total = cls.zero(x_RC.shape[1])
        for start in range(0, x_RC.shape[0], _ROWS):
            at = slice(start, start + _ROWS)
            total = total + _block(x_RC[at], None if live_RC is None else live_RC[at])
        return total

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            _added(self.count, other.count),
            _added(self.sums, other.sums),
            _added(self.squares, other.squares),
            [a or b for a, b in zip(self.nonfinite, other.nonfinite, strict=True)],
        )

    def mean_variance(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """mean = S/N, variance = (N·Q − S²)/N², each rounded once: Python's quotient of integers is."""
        mean, variance = np.full((2, len(self.count)), np.nan)
        for c, (n, s, q, bad) in enumerate(zip(self.count, self.sums, self.squares, self.nonfinite, strict=True)):
            if n and not bad:
                mean[c] = s / (n << _UNIT)
                variance[c] = _quotient(n * q - s * s, n * n << 2 * _UNIT)
        return mean, variance

    @property
    def fingerprint(self) -> int:
        """A name of the totals, of 62 bits."""
        text = repr((self.count, self.sums, self.squares)).encode()
        return int.from_bytes(digest(text), "little") >> 2

    def arrays(self) -> dict[str, Array]:
        """Integers as digits: int64, the lowest first, of 32 bits each, the last with a sign; and where they begin."""
        state: dict[str, Array] = {"count": np.array(self.count, np.int64)}
        for name, values in (("sum", self.sums), ("squares", self.squares)):
            low, high = span(values)
            state[name] = digits_of(values, low, high)
            state[f"{name}_begins"] = np.array(low, np.int64)
        return state

    @classmethod
    def from_arrays(cls, state: Mapping[str, ArrayLike]) -> Totals:
        """The way back from `arrays`."""
        missing = {"count", "sum", "sum_begins", "squares", "squares_begins"} - set(state)
        if missing:
            raise ValueError(
                f"load_state_dict: expected the arrays of state_dict(), missing {', '.join(sorted(missing))}."
            )
        read = {name: np.asarray(plain_array(value, name)) for name, value in state.items()}
        count = read["count"].astype(np.int64).reshape(-1)
        for name in ("sum", "squares"):
            if read[name].ndim != 2 or read[name].shape[1] != count.size or read[name].dtype != np.int64:
                raise ValueError(
                    f"load_state_dict: expected {name!r} of int64 and shape (digits, {count.size}), received "
                    f"{read[name].dtype} of shape {read[name].shape}."
                )
        sums, squares = (integers_of(read[name], int(read[f"{name}_begins"])) for name in ("sum", "squares"))
        return cls(count.tolist(), sums, squares, [False] * count.size)


def _added(mine: list[int], theirs: list[int]) -> list[int]:
    return [a + b for a, b in zip(mine, theirs, strict=True)]


def span(values: Sequence[int]) -> tuple[int, int]:
    """The digits that some integers take: from the first that is not 0, to behind the last; (0, 1) at least."""
    some = [value for value in values if value]
    if not some:
        return 0, 1
    low = min((value & -value).bit_length() - 1 for value in some) // _DIGIT
    high = max(value.bit_length() for value in some) // _DIGIT + 1
    return low, max(high, low + 1)


def digits_of(values: Sequence[int], low: int, high: int) -> NDArray[np.int64]:
    """(high − low, C) digits; the last one keeps the sign."""
    rows = [[value >> _DIGIT * k & (1 << _DIGIT) - 1 for value in values] for k in range(low, high - 1)]
    rows.append([value >> _DIGIT * (high - 1) for value in values])
    return np.array(rows, np.int64).reshape(high - low, len(values))


def integers_of(digits: NDArray[np.int64], low: int) -> list[int]:
    """The way back from `digits_of`."""
    totals = [0] * digits.shape[1]
    for k, row in enumerate(digits.tolist()):
        totals = [total + (digit << _DIGIT * (low + k)) for total, digit in zip(totals, row, strict=True)]
    return totals


def _block(x_RC: Array, live_RC: NDArray[np.bool_] | None) -> Totals:
    from fractions import Fraction  # with `decimal` a twentieth of this package's import

    wide = x_RC.astype(np.float64)
    finite = np.isfinite(wide)
    live = np.ones(wide.shape, bool) if live_RC is None else live_RC
    nonfinite = (live & ~finite).any(0)
    values = np.where(live & finite, wide, 0.0)
    exact = wide if x_RC.dtype.kind not in "iu" or x_RC.dtype.itemsize < 8 else None
    largest = np.abs(values).max(0, initial=0.0)
    exponent = np.frexp(largest)[1]
    scaled = np.ldexp(values, -exponent)
    smallest = np.where(scaled != 0, np.abs(scaled), 1.0).min(0, initial=1.0)
    too_far = (smallest < 2.0**_SMALLEST) | (np.ldexp(scaled, exponent) != values).any(0)
    if exact is None:  # int64 and uint64 may have more digits than a float64
        too_far |= largest > 2.0**53
    scaled = np.where(too_far, 0.0, scaled)
    sums = _exact_sum(scaled)
    squares = [
        a + b for a, b in zip(_exact_sum(scaled * scaled), _exact_sum(product_error(scaled, scaled)), strict=True)
    ]
    e = exponent.tolist()
    totals = Totals(
        live.sum(0).tolist(),
        [_shifted(s, k + _UNIT) for s, k in zip(sums, e, strict=True)],
        [_shifted(q, 2 * (k + _UNIT)) for q, k in zip(squares, e, strict=True)],
        np.asarray(nonfinite).tolist(),
    )
    for c in np.flatnonzero(too_far).tolist():
        counted = live[:, c] & finite[:, c]
        column = x_RC[counted, c] if x_RC.dtype.kind in "iu" else wide[counted, c]
        numbers = [Fraction(value) for value in column.tolist()]
        totals.sums[c] = int(sum(numbers) * 2**_UNIT)
        totals.squares[c] = int(sum(v * v for v in numbers) * 4**_UNIT)
    return totals


def _exact_sum(t_RC: NDArray[np.float64]) -> list[Fraction]:
    """Σt of each channel, |t| ≤ 1: all values give up 30 bits at a time, as integers, until nothing is left of them."""
    from fractions import Fraction

    totals = [Fraction(0)] * t_RC.shape[1]
    k = 0
    while t_RC.any():
        k += _FOLD
        q = np.rint(np.ldexp(t_RC, k))
        t_RC = t_RC - np.ldexp(q, -k)
        rows = q.astype(np.int64).sum(0).tolist()
        totals = [total + Fraction(row, 1 << k) for total, row in zip(totals, rows, strict=True)]
    return totals


def _shifted(value: Fraction, k: int) -> int:
    """value·2^k, which is a whole number."""
    numerator = value.numerator << max(k, 0)
    quotient, rest = divmod(numerator, value.denominator << max(-k, 0))
    assert rest == 0
    return quotient


def _quotient(a: int, b: int) -> float:
    try:
        return a / b
    except OverflowError:
        return float("inf")
