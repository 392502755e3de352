"""Exact mean and variance of any data over all ranks: of one array, or of all that ever came.

Sums are kept as integers, Σx in units of 2^-1074 and Σx² in units of 2^-2148, in which every float64 is a whole number.
Nothing is rounded before the result is, once. So neither the order of the rows, nor how they were split over batches,
ranks and runs, can be seen in any bit; adding two histories is exact too.

Shape suffixes: R rows, C channels (whatever remains of a shape, flattened).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from math import prod
from typing import Any, Literal, Protocol, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.collective import Collective, current
from bnlayer.dtypes import is_real
from bnlayer.limbs import product_error
from bnlayer.plain import plain_array

_UNIT = 1074  # every float64 is a whole number of 2^-1074, its square one of 2^-2148
_DIGIT = 32  # bits of a digit in which integers are saved and sent: the sum of 2^31 ranks' digits fits int64
_FOLD = 30  # bits that are taken of all values at once; sums of 2^32 rows fit int64
_SMALLEST = -450  # exponent below the largest value's, under which the error of a square could underflow
_ROWS = 2**14  # at a time: their temporaries fit a cache

Array = NDArray[Any]


@dataclass(frozen=True, eq=False, slots=True)
class Statistics:
    """Count, mean and biased variance, of the shape that remains when the reduced axes are taken out.

        count, mean, variance = bnlayer.moments(x, axis=0)

    Attributes:
        count: int64.
        mean, variance: float64, each rounded once; NaN where nothing was counted, or a value was not finite.
    """

    count: NDArray[np.int64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """The three, in this order."""
        return iter((self.count, self.mean, self.variance))


class _Reducing(Protocol):
    def allreduce(self, arrays: Iterable[ArrayLike], op: Literal["sum", "max", "min"] = "sum") -> list[Array]: ...


def moments(
    x: ArrayLike,
    axis: int | Sequence[int] | None = None,
    mask: ArrayLike | None = None,
    *,
    collective: Collective | None = None,
) -> Statistics:
    """The exact count, mean and variance of an array whose rows lie on all ranks; every rank calls it.

        count, mean, variance = bnlayer.moments(x, axis=0)

    Args:
        x: this rank's part, of any real dtype; the axes that remain are alike on all ranks. It may be empty.
        axis: what is reduced, as in `np.mean`; None: all axes.
        mask: bool, broadcasts to x; False keeps a value out.
        collective: the ranks; the current world where None: the one that was joined, or torch's process group.

    Returns:
        The same bits on every rank, however the rows lie on them.

    Raises:
        TypeError: x is not of real numbers.
        ValueError: axis or mask does not fit x.
        RuntimeError: several ranks are announced, but no world was joined.
        CollectiveError: the ranks disagree, or one is lost.
    """
    rows, shape = _rows(x, axis)
    totals = _united(_Totals.of(*_kept(rows, x, axis, mask)), collective)
    return totals.statistics(shape)


class RunningMoments:
    """The exact moments of all rows that any rank has ever seen: for normalizing observations, inputs or rewards.

        seen = bnlayer.RunningMoments((3,))
        seen.update(observations)                # (n, 3) on each rank; n may differ, and be 0
        normalized = (observations - seen.mean) / np.sqrt(seen.variance + 1e-8)

    Every rank holds the whole history, the same on all, and each row counts once in it: after a restart from
    `state_dict` on every rank, whatever their number by then, too.

    Args:
        shape: of one row.
        collective: the ranks; the current world where None: the one that was joined, or torch's process group.
    """

    def __init__(self, shape: int | Sequence[int] = (), *, collective: Collective | None = None) -> None:
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self._collective = collective
        self._totals = _Totals.zero(prod(self.shape))

    def update(self, x: ArrayLike, mask: ArrayLike | None = None) -> None:
        """Add the rows of all ranks; every rank calls it.

        Args:
            x: this rank's rows, (n, *shape) or with more leading axes, of any real dtype; n may be 0.
            mask: bool, broadcasts to x; False keeps a value out.

        Raises:
            TypeError: x is not of real numbers.
            ValueError: x does not end in the shape; or on every rank: a value is not finite, or the ranks hold
                different histories. Nothing was added then.
            CollectiveError: the ranks disagree, or one is lost.
        """
        array = plain_array(x, "x")
        leading = array.ndim - len(self.shape)
        if leading < 1 or array.shape[leading:] != self.shape:
            raise ValueError(f"update(x): expected rows of shape {self.shape}, (n, …), received shape {array.shape}.")
        axes = tuple(range(leading))
        rows, _ = _rows(array, axes)
        totals = _united(_Totals.of(*_kept(rows, array, axes, mask)), self._collective, self._totals.fingerprint)
        if any(totals.nonfinite):
            raise ValueError(
                f"update(x): a value is not finite, in {sum(totals.nonfinite)} of {len(totals.nonfinite)} channels of "
                "the ranks' rows, which were not added. Mask it: update(x, mask=np.isfinite(x))."
            )
        self._totals = self._totals + totals

    @property
    def count(self) -> NDArray[np.int64]:
        """The rows so far, of `shape`."""
        return self._totals.statistics(self.shape).count

    @property
    def mean(self) -> NDArray[np.float64]:
        """Their mean, of `shape`; NaN before the first row."""
        return self._totals.statistics(self.shape).mean

    @property
    def variance(self) -> NDArray[np.float64]:
        """Their biased variance, of `shape`; NaN before the first row."""
        return self._totals.statistics(self.shape).variance

    def statistics(self) -> Statistics:
        """All three at once."""
        return self._totals.statistics(self.shape)

    def state_dict(self) -> dict[str, Array]:
        """The whole history as arrays, for `np.savez`, `torch.save` or safetensors; the same on every rank."""
        return self._totals.arrays()

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Go on from a history; every rank does it, with the same one, whatever their number is now.

        Raises:
            ValueError: it is none of `state_dict`'s, or one of rows of another shape.
        """
        totals = _Totals.from_arrays(state)
        if len(totals.count) != prod(self.shape):
            raise ValueError(
                f"load_state_dict: expected the history of rows of {prod(self.shape)} values, received "
                f"{len(totals.count)}."
            )
        self._totals = totals

    def __add__(self, other: RunningMoments) -> Self:
        """The history of both, which must have no row in common: those of two jobs, say.

        Raises:
            ValueError: their rows have different shapes.
        """
        if self.shape != other.shape:
            raise ValueError(f"Rows of shape {self.shape} and {other.shape} can't be added.")
        total = type(self)(self.shape, collective=self._collective)
        total._totals = self._totals + other._totals
        return total

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same sums."""
        return isinstance(other, RunningMoments) and (self.shape, self._totals) == (other.shape, other._totals)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"RunningMoments(shape={self.shape}, rows={max(self._totals.count, default=0)})"


@dataclass(frozen=True, slots=True)
class _Totals:
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
    def zero(cls, channels: int) -> _Totals:
        return cls([0] * channels, [0] * channels, [0] * channels, [False] * channels)

    @classmethod
    def of(cls, x_RC: Array, live_RC: NDArray[np.bool_] | None) -> _Totals:
        """The totals of rows; of the live values where it is given."""
        total = cls.zero(x_RC.shape[1])
        for start in range(0, x_RC.shape[0], _ROWS):
            at = slice(start, start + _ROWS)
            total = total + _block(x_RC[at], None if live_RC is None else live_RC[at])
        return total

    def __add__(self, other: _Totals) -> _Totals:
        return _Totals(
            _added(self.count, other.count),
            _added(self.sums, other.sums),
            _added(self.squares, other.squares),
            [a or b for a, b in zip(self.nonfinite, other.nonfinite, strict=True)],
        )

    def statistics(self, shape: tuple[int, ...]) -> Statistics:
        """mean = S/N, variance = (N·Q − S²)/N², each rounded once: Python's quotient of integers is."""
        mean, variance = np.full((2, len(self.count)), np.nan)
        for c, (n, s, q, bad) in enumerate(zip(self.count, self.sums, self.squares, self.nonfinite, strict=True)):
            if n and not bad:
                mean[c] = s / (n << _UNIT)
                variance[c] = _quotient(n * q - s * s, n * n << 2 * _UNIT)
        return Statistics(np.array(self.count, np.int64).reshape(shape), mean.reshape(shape), variance.reshape(shape))

    @property
    def fingerprint(self) -> int:
        """A name of the totals, of 62 bits."""
        text = repr((self.count, self.sums, self.squares)).encode()
        return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 2

    def arrays(self) -> dict[str, Array]:
        """Integers as digits: int64, the lowest first, of 32 bits each, the last with a sign; and where they begin."""
        state: dict[str, Array] = {"count": np.array(self.count, np.int64)}
        for name, values in (("sum", self.sums), ("squares", self.squares)):
            low, high = _span(values)
            state[name] = _digits(values, low, high)
            state[f"{name}_begins"] = np.array(low, np.int64)
        return state

    @classmethod
    def from_arrays(cls, state: Mapping[str, ArrayLike]) -> _Totals:
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
        sums, squares = (_integers(read[name], int(read[f"{name}_begins"])) for name in ("sum", "squares"))
        return cls(count.tolist(), sums, squares, [False] * count.size)


def _added(mine: list[int], theirs: list[int]) -> list[int]:
    return [a + b for a, b in zip(mine, theirs, strict=True)]


# ---- over the ranks ----


def _united(mine: _Totals, collective: Collective | None, history: int = 0) -> _Totals:
    """The totals of all ranks' rows.

    Two exchanges: how many digits it takes, and whether all ranks hold the same history; then the digits.
    """
    collective = current() if collective is None else collective
    if collective.world_size == 1:
        return mine
    if not hasattr(collective, "allreduce"):
        raise RuntimeError(
            f"Expected a world that reduces arrays, as bnworker.join() makes it; received {collective!r}."
        )
    world = cast("_Reducing", collective)
    spans = [_span(mine.sums), _span(mine.squares)]
    ends = [end for low, high in spans for end in (-low, high)]
    (agreed,) = world.allreduce([np.array([*ends, history, -history], np.int64)], "max")
    *ends, most, least = agreed.tolist()
    if most != -least:
        raise ValueError(
            "The ranks hold different histories: load the same state_dict() on every rank, and update on all alike."
        )
    sums, squares = (-ends[0], ends[1]), (-ends[2], ends[3])
    whole = [
        np.array(mine.count, np.int64),
        np.array(mine.nonfinite, np.int64),
        _digits(mine.sums, *sums),
        _digits(mine.squares, *squares),
    ]
    count, nonfinite, sum_digits, square_digits = world.allreduce(whole, "sum")
    return _Totals(
        count.tolist(), _integers(sum_digits, sums[0]), _integers(square_digits, squares[0]), (nonfinite > 0).tolist()
    )


def _span(values: Sequence[int]) -> tuple[int, int]:
    """The digits that some integers take: from the first that is not 0, to behind the last; (0, 1) at least."""
    some = [value for value in values if value]
    if not some:
        return 0, 1
    low = min((value & -value).bit_length() - 1 for value in some) // _DIGIT
    high = max(value.bit_length() for value in some) // _DIGIT + 1
    return low, max(high, low + 1)


def _digits(values: Sequence[int], low: int, high: int) -> NDArray[np.int64]:
    """(high − low, C) digits; the last one keeps the sign."""
    rows = [[value >> _DIGIT * k & (1 << _DIGIT) - 1 for value in values] for k in range(low, high - 1)]
    rows.append([value >> _DIGIT * (high - 1) for value in values])
    return np.array(rows, np.int64).reshape(high - low, len(values))


def _integers(digits: NDArray[np.int64], low: int) -> list[int]:
    totals = [0] * digits.shape[1]
    for k, row in enumerate(digits.tolist()):
        totals = [total + (digit << _DIGIT * (low + k)) for total, digit in zip(totals, row, strict=True)]
    return totals


# ---- one array ----


def _rows(x: ArrayLike, axis: int | Sequence[int] | None) -> tuple[Array, tuple[int, ...]]:
    """An array as (R, C), and the shape of C."""
    array = plain_array(x, "x")
    if not is_real(array.dtype):
        raise TypeError(f"Expected x of a real dtype, received dtype {array.dtype}.")
    axes = range(array.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    if any(not -array.ndim <= a < array.ndim for a in axes):
        raise ValueError(f"axis={axis} is out of bounds for x of shape {array.shape}.")
    reduced = sorted({a % array.ndim for a in axes})
    kept = [a for a in range(array.ndim) if a not in reduced]
    shape = tuple(array.shape[a] for a in kept)
    return array.transpose(*reduced, *kept).reshape(prod(array.shape[a] for a in reduced), prod(shape)), shape


def _kept(
    rows: Array, x: ArrayLike, axis: int | Sequence[int] | None, mask: ArrayLike | None
) -> tuple[Array, NDArray[np.bool_] | None]:
    """The rows, and which of their values count; None: all."""
    if mask is None:
        return rows, None
    m, shape = plain_array(mask, "the mask").astype(bool), np.shape(plain_array(x, "x"))
    try:
        m = np.broadcast_to(m, shape)
    except ValueError as error:
        raise ValueError(f"The mask does not broadcast to x: mask.shape={m.shape}, x.shape={shape}.") from error
    return rows, _rows(m, axis)[0]


def _block(x_RC: Array, live_RC: NDArray[np.bool_] | None) -> _Totals:
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
    totals = _Totals(
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
    whole = value * Fraction(2) ** k
    assert whole.denominator == 1
    return whole.numerator


def _quotient(a: int, b: int) -> float:
    try:
        return a / b
    except OverflowError:
        return float("inf")
