"""The calls of a world of one in the compiled kernels: each is one crossing, all of a training call or of its backward.

Shape suffixes: A axes before the channels, C channels, B axes after them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import _native as native
from bnlayer.kernels.buffers import Array, Mask, fitting, plain
from bnlayer.kernels.results import RECORD_BYTES, CallSettings

_FLOAT32, _UINT8, _UINT16 = np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.uint16)


class CompiledAlone:
    """The part of `Compiled` that makes such calls."""

    _variant: int
    _threads: int
    _worth: int

    @staticmethod
    def has_calls_alone(arithmetic: np.dtype[Any], variables: np.dtype[Any]) -> bool:
        """Whether `train_alone` and `pull_alone` are for layers of these dtypes."""
        return arithmetic == _FLOAT32 == variables

    def train_alone(
        self,
        x: Array,
        shape: tuple[int, ...],
        grid: Grid,
        gamma: Array | None,
        beta: Array | None,
        mean: Array,
        variance: Array,
        settings: CallSettings,
    ) -> tuple[Array, Array, Array, NDArray[np.uint8], bytes] | None:
        """A training call of a world of one, in one crossing; None: a value does not fit the grid.

        Args:
            x: (A, C, B), the batch.
            shape: of the output.
            grid: that is known.
            gamma, beta: (C,) float32; None: there is none.
            mean, variance: the moving statistics before it, (C,) float32.
            settings: of the layer.

        Returns:
            The output, the moving mean and variance after it, the `Record` of the batch, and its `sample`.
        """
        channels, (epsilon, momentum, synchronized, unbiased) = mean.size, settings
        flags = x.flags
        rows = x if x.dtype is _FLOAT32 and flags.c_contiguous and flags.aligned else plain(x)
        y, record = np.empty(shape, rows.dtype), np.empty(RECORD_BYTES * channels, _UINT8)
        new_mean, new_variance = np.empty(channels, _FLOAT32), np.empty(channels, _FLOAT32)
        seen = native.train_alone(
            self._variant, self._threads, self._worth, rows, grid.pivot_C, grid.exponent_C, epsilon, gamma, beta, mean,
            variance, momentum, synchronized, unbiased, new_mean, new_variance, record, y,
        )  # fmt: skip
        if seen is None:
            return None
        if rows.dtype is _UINT16:
            y = y.view(x.dtype)
        return y, new_mean, new_variance, record, seen

    def pull_alone(
        self,
        dy: Array,
        x: Array,
        mask: Mask,
        seen: bytes | None,
        shape: tuple[int, ...],
        grid: BackwardGrid,
        record: NDArray[np.uint8],
        scale: bool,
        center: bool,
    ) -> tuple[Array, Array | None, Array | None] | None:
        """Its backward pass; None: a value does not fit the grid, or the batch had values that are not finite.

        Args:
            dy, x, mask: the batch.
            seen: its sample at the call: it is refused if it was written to; None: that is known.
            shape: of dx.
            grid: that is known.
            record: the `Record` of the training call.
            scale, center: whether there is a gamma, and a beta.

        Returns:
            dx, and the gradients of gamma and beta, (C,) float32.
        """
        channels, precision, rows = x.shape[1], grid.precision, plain(x)
        dx = np.empty(shape, rows.dtype)
        gamma = np.empty(channels, _FLOAT32) if scale else None
        beta = np.empty(channels, _FLOAT32) if center else None
        refused = native.pull_alone(
            self._variant, self._threads, self._worth, rows, plain(dy), fitting(mask, x), seen, record,
            grid.gradient_C, grid.deviation_C, precision.deviation_floor, precision.deviation_ceiling, gamma, beta, dx,
        )  # fmt: skip
        return None if refused else (dx.view(x.dtype) if rows.dtype is _UINT16 else dx, gamma, beta)

    def forward_at(
        self,
        shape: tuple[int, int, int],
        x: int,
        y: int,
        affine: bool,
        weights: tuple[int, ...],
        grid: Grid,
        epsilon: float,
        momentum: float,
        unbiased: bool,
        before: NDArray[np.uint8],
        record: NDArray[np.uint8],
    ) -> bool:
        """A training call of a world of one on contiguous float32 memory, given by its addresses.

        Args:
            shape: (A, C, B).
            x, y: where the batch and the output lie.
            affine: whether there are gamma and beta.
            weights: where gamma, beta, the moving mean and variance, and an int64 that counts the calls lie; the last
                three are updated in place.
            grid: that is known.
            epsilon, momentum, unbiased: the layer's.
            before: the `Record` of the call before: the moving statistics must still be its.
            record: the `Record` to write.

        Returns:
            Whether it was made; otherwise nothing of it counts.
        """
        gamma, beta, mean, variance, calls = weights
        return native.forward_at(
            self._variant, self._threads, self._worth, *shape, x, y, affine, gamma, beta, mean, variance, calls,
            grid.pivot_C, grid.exponent_C, epsilon, momentum, unbiased, before, record,
        )  # fmt: skip

    def backward_at(
        self,
        shape: tuple[int, int, int],
        x: int,
        dy: int,
        dx: int,
        gradients: tuple[int, int],
        record: NDArray[np.uint8],
        grid: BackwardGrid,
    ) -> bool:
        """Its backward pass, which writes dx, and dγ and dβ, rounded, at `gradients`; 0: there are none."""
        precision = grid.precision
        return native.backward_at(
            self._variant, self._threads, self._worth, *shape, x, dy, dx, *gradients, record, grid.gradient_C,
            grid.deviation_C, precision.deviation_floor, precision.deviation_ceiling,
        )  # fmt: skip
