"""The moving update: one pure function, used by the layer and by the owner of the moving statistics.

Both apply it to the same reduced limbs, so a rank's mirror and the owner's values are the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bnlayer.dtypes import rounded
from bnlayer.kernels import kernels
from bnlayer.kernels.formulas import towards, unrounded, with_unbiased_variance
from bnlayer.kernels.results import BatchStatistics

Vector = NDArray[Any]

_NAMES = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")


class Moving(NamedTuple):
    """What a layer remembers of its batches, each (C,), in the variable dtype.

    Attributes:
        mean, variance: what inference normalizes with.
        stddev: with renorm, the moving √(v + ε) from which `variance` follows; None without.
        renorm_mean, renorm_stddev: with renorm, what the corrections are taken against; None without.
    """

    mean: Vector
    variance: Vector
    stddev: Vector | None = None
    renorm_mean: Vector | None = None
    renorm_stddev: Vector | None = None

    @property
    def values(self) -> tuple[Vector, ...]:
        """All of them, in Keras's order."""
        if self.stddev is None or self.renorm_mean is None or self.renorm_stddev is None:
            return self.mean, self.variance
        return self.mean, self.variance, self.stddev, self.renorm_mean, self.renorm_stddev

    @property
    def vectors(self) -> dict[str, Vector]:
        """All of them, by Keras's names and in its order."""
        return dict(zip(_NAMES, self.values, strict=False))


@dataclass(frozen=True, slots=True)
class Rule:
    """How a layer's moving statistics follow its batches.

    Attributes:
        momentum: the weight of the old value.
        epsilon: the layer's.
        renorm_momentum: the same for the statistics of renorm.
        synchronized: whether one rank's bad values must not destroy the statistics of all.
        masked: whether the call had a mask.
        unbiased: whether the variance moves towards N/(N − 1) times the batch's, torch's convention.
    """

    momentum: float
    epsilon: float
    renorm_momentum: float = 0.99
    synchronized: bool = True
    masked: bool = False
    unbiased: bool = False


def update(moving: Moving, statistics: BatchStatistics, rule: Rule) -> Moving:
    """The moving statistics after a training call.

        moving · momentum + batch · (1 − momentum)        in float64, rounded to the variable's dtype

    With renorm, the standard deviation moves, and variance = max(stddev² − ε, 0).

    A channel without a value is left alone, and so is one of a single value where the variance is to be unbiased; but
    a local, masked layer follows Keras, whose statistics of nothing are 0. Where a value was not finite, or a result
    would not be, a synchronized layer leaves the channel alone too (one rank's NaN would destroy the statistics of
    all); a local one follows Keras and takes it.

    Args:
        moving: the old values.
        statistics: of the global batch.
        rule: how.

    Returns:
        New arrays of the dtypes of the old ones.
    """
    if moving.stddev is None:
        arguments = moving.mean, moving.variance, rule.momentum
        mean, variance = kernels().moved(
            statistics, *arguments, synchronized=rule.synchronized, masked=rule.masked, unbiased=rule.unbiased
        )
        return Moving(mean, variance)
    if rule.unbiased:
        statistics = with_unbiased_variance(statistics)
    mean, variance, apply = statistics.mean, statistics.variance, statistics.count > 0
    if not rule.synchronized:
        apply = apply | rule.masked
        mean = np.where(statistics.nonfinite, np.nan, mean)
        variance = np.where(statistics.nonfinite, np.nan, variance)
    with np.errstate(over="ignore", invalid="ignore"):
        new = _moved_with_renorm(moving, mean, variance, rule)
        if rule.synchronized:
            finite = [np.isfinite(vector) for vector in new.vectors.values()]
            apply = apply & ~statistics.nonfinite & np.logical_and.reduce(finite)
    old = moving.vectors
    vectors = {name: np.where(apply, vector, old[name]) for name, vector in new.vectors.items()}
    return Moving(*vectors.values())


def _moved_with_renorm(moving: Moving, mean: NDArray[np.float64], variance: NDArray[np.float64], rule: Rule) -> Moving:
    assert moving.stddev is not None
    assert moving.renorm_mean is not None
    assert moving.renorm_stddev is not None
    stddev = np.sqrt(variance + rule.epsilon)
    moved = unrounded(moving.stddev, stddev, rule.momentum)
    return Moving(
        towards(moving.mean, mean, rule.momentum),
        rounded(np.maximum(moved * moved - rule.epsilon, 0.0), moving.variance.dtype),
        rounded(moved, moving.stddev.dtype),
        towards(moving.renorm_mean, mean, rule.renorm_momentum),
        towards(moving.renorm_stddev, stddev, rule.renorm_momentum),
    )
