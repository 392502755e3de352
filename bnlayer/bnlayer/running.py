"""Exact mean and variance of any data over all ranks: of one array, or of all that ever came.

Sums are kept as integers (`totals.py`), and nothing is rounded before the result is, once. So neither the order of the
rows, nor how they were split over batches, ranks and runs, can be seen in any bit; adding two histories is exact too.

Shape suffixes: R rows, C channels (whatever remains of a shape, flattened).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.collective import Collective, current
from bnlayer.dtypes import is_real
from bnlayer.plain import plain_array
from bnlayer.totals import Totals, digits_of, integers_of, span

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


def _statistics(totals: Totals, shape: tuple[int, ...]) -> Statistics:
    mean, variance = totals.mean_variance()
    return Statistics(np.array(totals.count, np.int64).reshape(shape), mean.reshape(shape), variance.reshape(shape))


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
    totals = _united(Totals.of(*_masked(rows, x, axis, mask)), collective)
    return _statistics(totals, shape)


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
        self._totals = Totals.zero(prod(self.shape))

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
        totals = _united(Totals.of(*_masked(rows, array, axes, mask)), self._collective, self._totals.fingerprint)
        if any(totals.nonfinite):
            raise ValueError(
                f"update(x): a value is not finite, in {sum(totals.nonfinite)} of {len(totals.nonfinite)} channels of "
                "the ranks' rows, which were not added. Mask it: update(x, mask=np.isfinite(x))."
            )
        self._totals = self._totals + totals

    @property
    def count(self) -> NDArray[np.int64]:
        """The rows so far, of `shape`."""
        return _statistics(self._totals, self.shape).count

    @property
    def mean(self) -> NDArray[np.float64]:
        """Their mean, of `shape`; NaN before the first row."""
        return _statistics(self._totals, self.shape).mean

    @property
    def variance(self) -> NDArray[np.float64]:
        """Their biased variance, of `shape`; NaN before the first row."""
        return _statistics(self._totals, self.shape).variance

    def statistics(self) -> Statistics:
        """All three at once."""
        return _statistics(self._totals, self.shape)

    def state_dict(self) -> dict[str, Array]:
        """The whole history as arrays, for `np.savez`, `torch.save` or safetensors; the same on every rank."""
        return self._totals.arrays()

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Go on from a history; every rank does it, with the same one, whatever their number is now.

        Raises:
            ValueError: it is none of `state_dict`'s, or one of rows of another shape.
        """
        totals = Totals.from_arrays(state)
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


# ---- over the ranks ----


def _united(mine: Totals, collective: Collective | None, history: int = 0) -> Totals:
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
    spans = [span(mine.sums), span(mine.squares)]
    ends = [end for low, high in spans for end in (-low, high)]
    (agreed,) = world.allreduce([np.array([*ends, history, -history], np.int64)], "max")
    *ends, most, least = agreed.tolist()
    if most != -least:
        raise ValueError(
            "The ranks hold different histories: load the same state_dict() on every rank, and update on all alike."
        )
    sums, squares = (-ends[0], ends[1]), (-ends[2], ends[3])
    mine_as_arrays = [
        np.array(mine.count, np.int64),
        np.array(mine.nonfinite, np.int64),
        digits_of(mine.sums, *sums),
        digits_of(mine.squares, *squares),
    ]
    count, nonfinite, sum_digits, square_digits = world.allreduce(mine_as_arrays, "sum")
    return Totals(
        count.tolist(),
        integers_of(sum_digits, sums[0]),
        integers_of(square_digits, squares[0]),
        (nonfinite > 0).tolist(),
    )


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
    remaining = [a for a in range(array.ndim) if a not in reduced]
    shape = tuple(array.shape[a] for a in remaining)
    return array.transpose(*reduced, *remaining).reshape(prod(array.shape[a] for a in reduced), prod(shape)), shape


def _masked(
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
