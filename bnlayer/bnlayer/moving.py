"""The moving update: one pure function, used by the layer and by the owner of the moving statistics.

Both apply it to the same reduced words, so a rank's mirror and the owner's values are the same bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bnlayer.moments import BatchStatistics


def update(
    moving_mean: NDArray[np.floating],
    moving_variance: NDArray[np.floating],
    statistics: BatchStatistics,
    momentum: float,
    *,
    synchronized: bool,
    masked: bool,
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The moving mean and variance after a training call.

        moving · momentum + batch · (1 − momentum)        in float64, rounded to the variable's dtype

    A channel without a value is left alone; but a local, masked layer follows Keras, whose statistics of nothing
    are 0. Where a value was not finite, or the result would not be, a synchronized layer leaves the channel alone
    too (one rank's NaN would destroy the statistics of all); a local one follows Keras and takes it.

    Args:
        moving_mean, moving_variance: (C,), any float dtype.
        statistics: of the global batch.
        momentum: the weight of the old value.
        synchronized: whether the layer is.
        masked: whether the call had a mask.

    Returns:
        Two new arrays of the dtypes of the old ones.
    """
    batch_mean, batch_variance = statistics.mean, statistics.variance
    apply = statistics.count > 0
    if not synchronized:
        apply = apply | masked
        batch_mean = np.where(statistics.poisoned, np.nan, batch_mean)
        batch_variance = np.where(statistics.poisoned, np.nan, batch_variance)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = (moving_mean.astype(np.float64) * momentum + batch_mean * (1.0 - momentum)).astype(moving_mean.dtype)
        variance = (moving_variance.astype(np.float64) * momentum + batch_variance * (1.0 - momentum)).astype(
            moving_variance.dtype
        )
    if synchronized:
        apply = apply & ~statistics.poisoned & np.isfinite(mean) & np.isfinite(variance)
    return np.where(apply, mean, moving_mean), np.where(apply, variance, moving_variance)
