"""The compiled kernel set: the functions of `reference`, and the same bits, by the extension module.

Shape suffixes: A axes before the channels, C channels, B axes after them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import _native as native
from bnlayer.kernels import formulas
from bnlayer.kernels.buffers import BFLOAT16, Array, Mask, fitting, plain
from bnlayer.kernels.compiled_alone import CompiledAlone
from bnlayer.kernels.results import (
    BatchStatistics,
    Gradients,
    PulledBack,
    Record,
    Trained,
    TrainingCall,
)
from bnlayer.limbs import limbs_of_sum

_FLOAT32 = np.dtype(np.float32)
_TAKEN = frozenset((_FLOAT32, np.dtype(np.float64), np.dtype(np.float16), BFLOAT16))
WORTH_A_THREAD = 2**16  # elements: a thread's part of fewer is done sooner than it is handed over


def variants() -> list[str]:
    """The variants that this processor runs, the widest first."""
    return native.variants()


def all_variants() -> list[str]:
    """The variants that were compiled for this kind of processor."""
    return native.compiled()


class Compiled(CompiledAlone):
    """One variant of the compiled kernels.

    Args:
        variant: one of `variants()`.
        threads: how many may share a pass.
        worth: elements: a part of fewer is not worth a thread.
    """

    def __init__(self, variant: str, threads: int = 1, worth: int = WORTH_A_THREAD) -> None:
        self.name = f"compiled ({variant})"
        self._variant, self._threads, self._worth = native.variants().index(variant), threads, worth

    @staticmethod
    def takes(x: Array, mask: Mask) -> bool:
        """Whether the passes take a batch as it is: any dtype with a kernel, and a mask of any form that a view has."""
        if x.dtype not in _TAKEN:
            return False
        return mask is None or mask.shape[2] == 0 or x.shape[2] % mask.shape[2] == 0

    def probe(self, x: Array, mask: Mask, grid: Grid) -> NDArray[np.int64]:
        """The largest keys of x and of −x over all finite unmasked values; see `reference.probe`."""
        del grid
        best = np.empty((2, x.shape[1]), np.int64)
        native.probe(self._variant, self._threads, self._worth, plain(x), fitting(mask, x), best)
        return best

    def moments(self, x: Array, mask: Mask, grid: Grid) -> NDArray[np.int64]:
        """The exact moments of a shard; see `reference.moments`."""
        limbs = np.empty((limbs_of_sum(grid.precision.folds), x.shape[1]), np.int64)
        native.moments(
            self._variant, self._threads, self._worth, plain(x), fitting(mask, x), grid.pivot_C, grid.exponent_C,
            limbs,
        )  # fmt: skip
        return limbs

    def normalize(
        self, x: Array, mean_C: Array, scale_C: Array, shift_C: Array, nonfinite_C: Array, out: Array | None = None
    ) -> Array:
        """(x − mean)·scale + shift; see `reference.normalize`. Of half types, the coefficients are float32."""
        y = np.empty(x.shape, x.dtype) if out is None else out
        native.normalize(
            self._variant, self._threads, self._worth, plain(x), mean_C, scale_C, shift_C, nonfinite_C, plain(y)
        )
        return y

    def gradient_probe(self, dy: Array, x: Array, pivot_C: Array, grid: BackwardGrid) -> NDArray[np.int64]:
        """The exponents of the largest finite |dy| and |x − pivot|; see `reference.gradient_probe`."""
        del grid
        best = np.empty((2, x.shape[1]), np.int64)
        native.gradient_probe(self._variant, self._threads, self._worth, plain(x), plain(dy), pivot_C, best)
        return best

    def gradient_sums(
        self, dy: Array, x: Array, mask: Mask, pivot_C: Array, grid: BackwardGrid, *, fits: bool = False
    ) -> NDArray[np.int64]:
        """The exact sums of a shard's output gradients; see `reference.gradient_sums`."""
        limbs = np.empty((limbs_of_sum(grid.precision.folds), x.shape[1]), np.int64)
        native.gradient_sums(
            self._variant, self._threads, self._worth, plain(x), plain(dy), fitting(mask, x), pivot_C,
            grid.gradient_C, grid.deviation_C, fits, limbs,
        )  # fmt: skip
        return limbs

    def input_gradient(
        self,
        dy: Array,
        x: Array,
        mask: Mask,
        mean_C: Array,
        offset_C: Array,
        slope_C: Array,
        scale_C: Array,
        nonfinite_C: Array,
        out: Array | None = None,
    ) -> Array:
        """((dy − offset) − (x − mean)·slope)·scale, or dy·scale where masked; see `reference.input_gradient`.

        Of float16 and bfloat16, the coefficients are float32.
        """
        dx = np.empty(x.shape, x.dtype) if out is None else out
        native.input_gradient(
            self._variant, self._threads, self._worth, plain(x), plain(dy), fitting(mask, x), mean_C, offset_C,
            slope_C, scale_C, nonfinite_C, plain(dx),
        )  # fmt: skip
        return dx

    def statistics(
        self, limbs: NDArray[np.int64], grid: Grid, epsilon: float, e: float
    ) -> tuple[BatchStatistics, NDArray[np.bool_] | None]:
        """The batch's statistics, and the channels that need a new grid; see `formulas.statistics`."""
        if grid.precision.folds == 2:
            return formulas.statistics(limbs, grid, epsilon, e)
        channels = limbs.shape[1]
        rows, singles = np.empty((8, channels)), np.empty((2, channels), np.float32)
        reach, flags = np.empty(channels, np.int64), np.empty((2, channels), np.bool_)
        any_refused = native.statistics(
            self._variant, plain(limbs), grid.pivot_C, grid.exponent_C, epsilon, e, rows, singles, reach,
            flags,
        )  # fmt: skip
        statistics = BatchStatistics(rows, singles[0], singles[1], reach, flags[0])
        return statistics, flags[1] if any_refused else None

    def moved(
        self,
        statistics: BatchStatistics,
        old_mean: Array,
        old_variance: Array,
        momentum: float,
        *,
        synchronized: bool,
        masked: bool,
        unbiased: bool = False,
    ) -> tuple[Array, Array]:
        """The moving mean and variance after a batch; see `formulas.moved`."""
        if old_mean.dtype != _FLOAT32:
            return formulas.moved(
                statistics,
                old_mean,
                old_variance,
                momentum,
                synchronized=synchronized,
                masked=masked,
                unbiased=unbiased,
            )
        new = np.empty((2, old_mean.size), np.float32)
        native.moved(
            self._variant, statistics.rows, statistics.nonfinite, old_mean, old_variance, momentum,
            synchronized, masked, unbiased, new,
        )  # fmt: skip
        return new[0], new[1]

    def coefficients(
        self, statistics: BatchStatistics, gamma: Array | None, beta: Array | None, dtype: np.dtype[Any]
    ) -> tuple[Array, Array]:
        """γs and β − residual·γs; see `formulas.coefficients`."""
        if dtype != _FLOAT32 or any(v is not None and v.dtype != _FLOAT32 for v in (gamma, beta)):
            return formulas.coefficients(statistics, gamma, beta, dtype)
        made = np.empty((2, statistics.nonfinite.size), np.float32)
        native.coefficients(self._variant, statistics.rows, gamma, beta, made)
        return made[0], made[1]

    def gradients(
        self, limbs: NDArray[np.int64], grid: BackwardGrid, forward: BatchStatistics
    ) -> tuple[Gradients, NDArray[np.bool_] | None]:
        """The gradients, and the channels that need a new grid; see `formulas.gradients`."""
        if grid.precision.folds == 2:
            return formulas.gradients(limbs, grid, forward)
        channels = limbs.shape[1]
        rows, singles = np.empty((4, channels)), np.empty((2, channels), np.float32)
        flags = np.empty((2, channels), np.bool_)
        any_refused = native.gradients(
            self._variant, plain(limbs), grid.gradient_C, grid.deviation_C, forward.rows,
            forward.nonfinite, rows, singles, flags,
        )  # fmt: skip
        return Gradients(rows, singles[0], singles[1], flags[0]), flags[1] if any_refused else None

    def finish_forward(
        self, x: Array, limbs: NDArray[np.int64], grid: Grid, call: TrainingCall, *, accepted: bool
    ) -> Trained | None:
        """All that follows from a training call's totals, in one; None: not for this call.

        Args:
            x: (A, C, B), the batch; `takes` it.
            limbs: (W, C), reduced.
            grid: what they are in units of.
            call: what else the results follow from.
            accepted: whether channels that are refused are taken all the same.
        """
        mean, gamma, beta = call.moving_mean, call.gamma, call.beta
        kind = _FLOAT32
        if x.dtype is not call.dtype or grid.precision.folds == 2 or mean.dtype is not kind:
            return None
        if (gamma is not None and gamma.dtype is not kind) or (beta is not None and beta.dtype is not kind):
            return None
        channels = x.shape[1]
        record, y = Record.empty(channels), np.empty(x.shape, x.dtype)
        new_mean, new_variance = np.empty(channels, np.float32), np.empty(channels, np.float32)
        refused = native.finish_forward(
            self._variant, self._threads, self._worth, plain(x), plain(limbs), grid.pivot_C,
            grid.exponent_C, call.epsilon, call.e, accepted, gamma, beta, mean, call.moving_variance,
            call.momentum, call.synchronized, call.unbiased, new_mean, new_variance,
            record.memory, plain(y),
        )  # fmt: skip
        return Trained(record, record.refused if refused else None, new_mean, new_variance, None, y)

    def finish_backward(
        self,
        dy: Array,
        x: Array,
        mask: Mask,
        limbs: NDArray[np.int64],
        grid: BackwardGrid,
        forward: BatchStatistics,
        scale_C: Array,
        *,
        accepted: bool,
    ) -> PulledBack | None:
        """All that follows from a backward pass's totals, in one; None: not for this call.

        Args:
            dy, x, mask: the batch; `takes` it.
            limbs: (W, C), reduced.
            grid: what they are in units of.
            forward: the statistics of the training call.
            scale_C: γs.
            accepted: whether channels that are refused are taken all the same.
        """
        if grid.precision.folds == 2:
            return None
        channels = x.shape[1]
        rows, singles = np.empty((4, channels)), np.empty((2, channels), np.float32)
        flags, dx = np.empty((2, channels), np.bool_), np.empty(x.shape, x.dtype)
        refused = native.finish_backward(
            self._variant, self._threads, self._worth, plain(x), plain(dy), fitting(mask, x),
            plain(limbs), grid.gradient_C, grid.deviation_C, accepted, forward.rows, forward.nonfinite,
            forward.rounded_mean, scale_C, rows, singles, flags, plain(dx),
        )  # fmt: skip
        return PulledBack(Gradients(rows, singles[0], singles[1], flags[0]), flags[1] if refused else None, dx)

    @staticmethod
    def sample(x: Array) -> bytes:
        """Some values of a batch; see `formulas.sample`."""
        return native.sample(plain(x)) if x.flags.c_contiguous else formulas.sample(x)
