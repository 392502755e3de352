"""Drift: whether a layer's moving statistics leave the band in which they have lately been.

Of each channel, two signals x are followed: the moving mean, and the logarithm of the moving variance. A band has a
centre m and a width d, which follow them over about `_SAMPLES_AVERAGED` samples (α = 1/_SAMPLES_AVERAGED):

    m ← m + α (x − m)        d ← d + α (|x − m| − d)

A sample is outside where |x − m| > max(6 d, floor). The floor is a quarter of the standard deviation √variance for the
mean, and 0.25 for the logarithm of the variance: what moves by less is not worth an alarm, however still it was before.
Since the band follows, an alarm ends when the statistics stay where they are now.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_SAMPLES_AVERAGED = 20
_WIDTHS = 6.0  # of a mean absolute deviation: five standard deviations of a normal distribution
_FLOOR = 0.25
_TINY = 1e-30  # a variance may be 0


@dataclass(frozen=True, slots=True)
class Drift:
    """Statistics that have left their band.

    Attributes:
        what: "mean" or "variance".
        channels: how many are outside.
        channel: the one that is furthest outside.
        before, now: of that channel: the centre of its band, and the sample.
    """

    what: str
    channels: int
    channel: int
    before: float
    now: float


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Where the statistics of one layer have lately been.

    Attributes:
        samples: how many it has followed.
        mean_C, mean_width_C: of the moving mean.
        log_C, log_width_C: of the logarithm of the moving variance.
    """

    samples: int
    mean_C: Vector
    mean_width_C: Vector
    log_C: Vector
    log_width_C: Vector

    @classmethod
    def around(cls, mean_C: Vector, variance_C: Vector) -> Band:
        """The band that begins with one sample."""
        zeros = np.zeros(len(mean_C))
        return cls(1, np.array(mean_C, np.float64), zeros, _log(variance_C), zeros)


def followed(band: Band, mean_C: Vector, variance_C: Vector) -> tuple[Band, tuple[Drift, ...]]:
    """The band after one more sample, and how the sample left the band before it.

    Args:
        band: before.
        mean_C, variance_C: the moving statistics, of as many channels as the band has.

    Returns:
        The band; a drift of the mean, of the variance, of both, or of none.
    """
    mean_C, log_C = np.asarray(mean_C, np.float64), _log(variance_C)
    away_mean, away_log = np.abs(mean_C - band.mean_C), np.abs(log_C - band.log_C)
    drifts: tuple[Drift, ...] = ()
    if band.samples >= _SAMPLES_AVERAGED:  # before, its widths say nothing yet
        floor = _FLOOR * np.exp(np.minimum(log_C, band.log_C) / 2)
        limit = np.maximum(_WIDTHS * band.mean_width_C, floor)
        drifts += _outside("mean", away_mean, limit, band.mean_C, mean_C)
        limit = np.maximum(_WIDTHS * band.log_width_C, _FLOOR)
        drifts += _outside("variance", away_log, limit, np.exp(band.log_C), np.exp(log_C))
    weight = 1 / min(band.samples + 1, _SAMPLES_AVERAGED)
    return Band(
        band.samples + 1,
        band.mean_C + weight * (mean_C - band.mean_C),
        band.mean_width_C + weight * (away_mean - band.mean_width_C),
        band.log_C + weight * (log_C - band.log_C),
        band.log_width_C + weight * (away_log - band.log_width_C),
    ), drifts


def _log(variance_C: Vector) -> Vector:
    return np.log(np.maximum(np.asarray(variance_C, np.float64), _TINY))


def _outside(what: str, away: Vector, limit: Vector, before: Vector, now: Vector) -> tuple[Drift, ...]:
    beyond = away / limit
    channels = int((beyond > 1).sum())
    if not channels:
        return ()
    worst = int(beyond.argmax())
    return (Drift(what, channels, worst, float(before[worst]), float(now[worst])),)
