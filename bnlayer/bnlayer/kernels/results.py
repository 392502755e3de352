"""What the kernels say of a batch, as arrays of its channels.

Shape suffixes: C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

RECORD_BYTES = 98  # of a channel, in a `Record`


class BatchStatistics(NamedTuple):
    """The statistics of one global batch.

    Attributes:
        rows: (8, C) float64, those of the properties below.
        rounded_mean: (C,), μ rounded to the data's dtype: what the passes that write subtract.
        pivot: (C,), p, what gradients are multiplied about, in the data's dtype: 0 where float32 data lie about the
            grid's pivot 0, else rounded_mean.
        reach: (C,) int64, |x − p| < 2^reach for every unmasked x.
        nonfinite: (C,) bool, an unmasked value was not finite, or lies outside every window.
    """

    rows: Doubles
    rounded_mean: NDArray[Any]
    pivot: NDArray[Any]
    reach: NDArray[np.int64]
    nonfinite: NDArray[np.bool_]

    @property
    def count(self) -> Doubles:  # type: ignore[override]  # of the batch, not of a tuple's items
        """N, the unmasked values of the channel over all ranks."""
        return cast("Doubles", self.rows[0])

    @property
    def divisor(self) -> Doubles:
        """D = N + e, where e = 1e-7 with a mask and 0 without; 1 where that is 0."""
        return cast("Doubles", self.rows[1])

    @property
    def mean(self) -> Doubles:
        """μ = Σx / D."""
        return cast("Doubles", self.rows[2])

    @property
    def variance(self) -> Doubles:
        """v = Σ(x − μ)² / D, biased."""
        return cast("Doubles", self.rows[3])

    @property
    def inverse_std(self) -> Doubles:
        """1 / √(v + ε)."""
        return cast("Doubles", self.rows[4])

    @property
    def residual(self) -> Doubles:
        """r = μ − rounded_mean, computed without cancellation."""
        return cast("Doubles", self.rows[5])

    @property
    def mean_share(self) -> Doubles:
        """μ·e/D, 0 without a mask."""
        return cast("Doubles", self.rows[6])

    @property
    def pivot_residual(self) -> Doubles:
        """μ − p."""
        return cast("Doubles", self.rows[7])


class TrainingCall(NamedTuple):
    """What the results of a training call follow from, beside its batch and the totals.

    Attributes:
        epsilon: the layer's.
        e: 1e-7 with a mask, else 0.
        gamma, beta: (C,); None: there is none.
        moving_mean, moving_variance: (C,), as they were before.
        momentum: weight of the old values.
        synchronized: whether one rank's bad values must not destroy the statistics of all.
        unbiased: whether the moving variance follows the unbiased one.
        dtype: of the output.
    """

    epsilon: float
    e: float
    gamma: NDArray[Any] | None
    beta: NDArray[Any] | None
    moving_mean: NDArray[Any]
    moving_variance: NDArray[Any]
    momentum: float
    synchronized: bool
    unbiased: bool
    dtype: np.dtype[Any]


class CallSettings(NamedTuple):
    """What of a layer's settings the results of a training call follow from.

    Attributes:
        epsilon, momentum, synchronized, unbiased: as of `TrainingCall`.
    """

    epsilon: float
    momentum: float
    synchronized: bool
    unbiased: bool


class Record(NamedTuple):
    """What a training call found, in one piece of memory: to make one array takes less than to make five.

    The offsets are those of `Record` in `native/training.cpp`. `finish_forward` gives the moving statistics as arrays
    of their own, and leaves their place in it empty.

    Attributes:
        memory: (98·C,) bytes: (8, C) float64, (C,) int64, (6, C) float32, (2, C) bool, one after the other.
    """

    memory: NDArray[np.uint8]

    @classmethod
    def empty(cls, channels: int) -> Record:
        """One to be written."""
        return cls(np.empty(RECORD_BYTES * channels, np.uint8))

    @classmethod
    def of_moving(cls, mean: NDArray[Any], variance: NDArray[Any]) -> Record:
        """One that holds float32 moving statistics, and nothing else."""
        record = cls(np.zeros(RECORD_BYTES * mean.size, np.uint8))
        record.mean[...], record.variance[...] = mean, variance
        return record

    @property
    def statistics(self) -> BatchStatistics:
        """Of the batch."""
        c = self.memory.size // RECORD_BYTES
        rows, reach = self.memory[: 64 * c].view(np.float64), self.memory[64 * c : 72 * c].view(np.int64)
        nonfinite = self.memory[96 * c : 97 * c].view(np.bool_)
        return BatchStatistics(rows.reshape(8, c), self._single(0), self._single(1), reach, nonfinite)

    @property
    def mean(self) -> NDArray[np.float32]:
        """(C,), the moving mean after a call of `forward_at`."""
        return self._single(2)

    @property
    def variance(self) -> NDArray[np.float32]:
        """(C,), the moving variance after it."""
        return self._single(3)

    @property
    def scale(self) -> NDArray[np.float32]:
        """(C,), γs."""
        return self._single(4)

    @property
    def refused(self) -> NDArray[np.bool_]:
        """(C,), the channels that need a new grid."""
        return self.memory[97 * (self.memory.size // RECORD_BYTES) :].view(np.bool_)

    def _single(self, row: int) -> NDArray[np.float32]:
        c = self.memory.size // RECORD_BYTES
        return self.memory[(72 + 4 * row) * c : (76 + 4 * row) * c].view(np.float32)


class Trained(NamedTuple):
    """The results of a training call; where a channel is refused, and that counts, the statistics alone.

    Attributes:
        batch_statistics: the statistics of the batch.
        refused: (C,) bool, the channels that need a new grid; None: none does.
        mean, variance: (C,), the moving statistics after it.
        scale_C: (C,), γs, in the precision of the arithmetic; None where a record has it.
        y: the output.
    """

    batch_statistics: BatchStatistics | Record
    refused: NDArray[np.bool_] | None
    mean: NDArray[Any] | None = None
    variance: NDArray[Any] | None = None
    scale_C: NDArray[Any] | None = None
    y: NDArray[Any] | None = None

    @property
    def statistics(self) -> BatchStatistics:
        """Of the batch."""
        return self.batch_statistics.statistics if isinstance(self.batch_statistics, Record) else self.batch_statistics

    @property
    def scale(self) -> NDArray[Any] | None:
        """(C,), γs."""
        return self.batch_statistics.scale if isinstance(self.batch_statistics, Record) else self.scale_C


class Gradients(NamedTuple):
    """What follows from the sums of a batch's output gradients.

    Attributes:
        rows: (4, C) float64, those of the properties below.
        rounded_offset, rounded_slope: (C,), in the data's dtype: what the pass that writes takes.
        nonfinite: (C,) bool, some value was not finite or lies outside every window.
    """

    rows: Doubles
    rounded_offset: NDArray[Any]
    rounded_slope: NDArray[Any]
    nonfinite: NDArray[np.bool_]

    @property
    def beta(self) -> Doubles:
        """dβ = Σ dy; NaN where nonfinite."""
        return cast("Doubles", self.rows[0])

    @property
    def gamma(self) -> Doubles:
        """dγ = s·Σ dy·(x − μ); NaN where nonfinite."""
        return cast("Doubles", self.rows[1])

    @property
    def offset(self) -> Doubles:
        """c1 of dx = ((dy − c1) − (x − rounded_mean)·slope)·γs."""
        return cast("Doubles", self.rows[2])

    @property
    def slope(self) -> Doubles:
        """k = s²·B/D."""
        return cast("Doubles", self.rows[3])


class PulledBack(NamedTuple):
    """The results of a backward pass; where a channel is refused, and that counts, the gradients alone.

    Attributes:
        gradients: of gamma and beta, and the coefficients of dx.
        refused: (C,) bool, the channels that need a new grid; None: none does.
        dx: the gradient of the inputs.
    """

    gradients: Gradients
    refused: NDArray[np.bool_] | None
    dx: NDArray[Any] | None = None
