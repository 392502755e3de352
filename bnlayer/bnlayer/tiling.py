"""The passes over a batch: as it is, or piece by piece.

A batch that the kernels don't take as it is has to be converted on the way: half types are computed in float32, a mask
of fewer axes is given a place for every element. Then they pass over it in pieces, so that what is converted is never
there as a whole. Sums are integers: the pieces can't be seen in any bit. (The compiled kernels take all that a layer's
batches mostly are; the reference takes less.)

Shape suffixes: A axes before the channels, C channels, B axes after them, W limbs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnlayer.dtypes import rounded
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import Kernels, kernels
from bnlayer.kernels.results import BatchStatistics, PulledBack, Trained, TrainingCall
from bnlayer.limbs import carried
from bnlayer.view import ALL_ROWS, View

Array = NDArray[Any]
T = TypeVar("T")

PIECE = 2**16  # elements to convert at a time: a quarter of a megabyte of float32, from a second-level cache


class Passes:
    """A kernel set's passes over batches of any dtype, with masks of any form.

    Args:
        kernels: the set.
        piece: elements to convert at a time.
    """

    def __init__(self, kernels: Kernels, piece: int = PIECE) -> None:
        self.kernels = kernels
        self._piece = piece

    def probe(self, view: View, grid: Grid) -> NDArray[np.int64]:
        """The largest keys of x and of −x over all finite unmasked values; (2, C)."""
        return _largest(self._over(view, None, grid, lambda x, mask, _: self.kernels.probe(x, mask, grid)))

    def moments(self, view: View, grid: Grid) -> NDArray[np.int64]:
        """The limbs of the batch's exact moments; (W, C)."""
        return _pooled(self._over(view, None, grid, lambda x, mask, _: self.kernels.moments(x, mask, grid)), flags=1)

    def normalize(
        self, view: View, mean_C: Array, scale_C: Array, shift_C: Array, nonfinite_C: Array, dtype: np.dtype[Any]
    ) -> Array:
        """(x − mean)·scale + shift in the coefficients' dtype, rounded once to `dtype`; NaN where nonfinite."""
        coefficients = mean_C, scale_C, shift_C, nonfinite_C

        def write(x: Array, mask: Array | None, dy: Array | None, out: Array | None) -> Array:
            del mask, dy
            return self.kernels.normalize(x, *coefficients, out)

        return self._written(View(view.x, None, view.shape), None, mean_C.dtype, dtype, write)

    def gradient_probe(self, dy: View, view: View, pivot_C: Array, grid: BackwardGrid) -> NDArray[np.int64]:
        """The exponents of the largest finite |dy| and |x − pivot|; (2, C)."""

        def pass_over(x: Array, mask: Array | None, gradient: Array) -> NDArray[np.int64]:
            del mask
            return self.kernels.gradient_probe(gradient, x, pivot_C, grid)

        return _largest(self._over(View(view.x, None, view.shape), dy, grid, pass_over))

    def gradient_sums(
        self, dy: View, view: View, pivot_C: Array, grid: BackwardGrid, *, fits: bool
    ) -> NDArray[np.int64]:
        """The limbs of the exact sums of the output's gradients; (W, C).

        Args:
            fits: whether the forward pass has shown that every x lies in its window.
        """

        def pass_over(x: Array, mask: Array | None, gradient: Array) -> NDArray[np.int64]:
            return self.kernels.gradient_sums(gradient, x, mask, pivot_C, grid, fits=fits)

        return _pooled(self._over(view, dy, grid, pass_over), flags=2)

    def input_gradient(
        self,
        dy: View,
        view: View,
        mean_C: Array,
        offset_C: Array,
        slope_C: Array,
        scale_C: Array,
        nonfinite_C: Array,
        dtype: np.dtype[Any],
    ) -> Array:
        """((dy − offset) − (x − mean)·slope)·scale where unmasked, dy·scale where masked, rounded once to `dtype`."""
        coefficients = mean_C, offset_C, slope_C, scale_C, nonfinite_C

        def write(x: Array, mask: Array | None, gradient: Array | None, out: Array | None) -> Array:
            assert gradient is not None
            return self.kernels.input_gradient(gradient, x, mask, *coefficients, out)

        return self._written(view, dy, mean_C.dtype, dtype, write)

    def finish_forward(
        self, view: View, limbs: NDArray[np.int64], grid: Grid, call: TrainingCall, *, accepted: bool
    ) -> Trained:
        """All that follows from a training call's totals.

        Args:
            view: the batch.
            limbs: (W, C), reduced.
            grid: what they are in units of.
            call: what else the results follow from.
            accepted: whether channels that are refused are taken all the same.
        """
        kernels = self.kernels
        if kernels.takes(view.x, None):
            trained = kernels.finish_forward(view.x, limbs, grid, call, accepted=accepted)
            if trained is not None:
                return trained
        statistics, refused = kernels.statistics(limbs, grid, call.epsilon, call.e)
        if refused is not None and not accepted:
            return Trained(statistics, refused)
        mean, variance = kernels.moved(
            statistics,
            call.moving_mean,
            call.moving_variance,
            call.momentum,
            synchronized=call.synchronized,
            masked=call.e != 0,
            unbiased=call.unbiased,
        )
        scale, shift = kernels.coefficients(statistics, call.gamma, call.beta, grid.precision.dtype)
        y = self.normalize(view, statistics.rounded_mean, scale, shift, statistics.nonfinite, call.dtype)
        return Trained(statistics, refused, mean, variance, scale, y)

    def finish_backward(
        self,
        dy: View,
        view: View,
        limbs: NDArray[np.int64],
        grid: BackwardGrid,
        forward: BatchStatistics,
        scale_C: Array,
        dtype: np.dtype[Any],
        *,
        accepted: bool,
    ) -> PulledBack:
        """All that follows from a backward pass's totals.

        Args:
            dy, view: the gradient of the output, and the batch.
            limbs: (W, C), reduced.
            grid: what they are in units of.
            forward: the statistics of the training call.
            scale_C: γs.
            dtype: of dx.
            accepted: whether channels that are refused are taken all the same.
        """
        kernels = self.kernels
        if view.x.dtype is dtype and self._takes(view, dy):
            pulled = kernels.finish_backward(dy.x, view.x, view.mask, limbs, grid, forward, scale_C, accepted=accepted)
            if pulled is not None:
                return pulled
        gradients, refused = kernels.gradients(limbs, grid, forward)
        if refused is not None and not accepted:
            return PulledBack(gradients, refused)
        coefficients = forward.rounded_mean, gradients.rounded_offset, gradients.rounded_slope, scale_C
        return PulledBack(gradients, refused, self.input_gradient(dy, view, *coefficients, gradients.nonfinite, dtype))

    def scaled(self, dy: View, scale_C: Array, dtype: np.dtype[Any]) -> Array:
        """dy·scale in the dtype of the scale, rounded once to `dtype`."""
        kind = scale_C.dtype
        if dy.x.dtype == kind == dtype:
            return np.asarray(np.multiply(dy.x, scale_C[:, None]))
        written = np.empty(dy.x.shape, dtype)
        for at in self._pieces(dy):
            written[at] = rounded(np.multiply(dy.values(at, kind), scale_C[:, None]), dtype)
        return written

    def _over(
        self, view: View, dy: View | None, grid: Grid | BackwardGrid, pass_over: Callable[[Array, Any, Any], T]
    ) -> list[T]:
        """What a pass says of each piece of a batch, in order."""
        if self._takes(view, dy):
            return [pass_over(view.x, view.mask, dy.x if dy is not None else None)]
        kind = grid.precision.dtype
        return [
            pass_over(view.values(at, kind), view.truths(at), dy.values(at, kind) if dy is not None else None)
            for at in self._pieces(view)
        ]

    def _written(
        self,
        view: View,
        dy: View | None,
        kind: np.dtype[Any],
        dtype: np.dtype[Any],
        write: Callable[[Array, Array | None, Array | None, Array | None], Array],
    ) -> Array:
        """What a pass writes, in a new array of a dtype."""
        written = np.empty(view.x.shape, dtype)
        if view.x.dtype == dtype and self._takes(view, dy):
            return write(view.x, view.mask, dy.x if dy is not None else None, written)
        for at in self._pieces(view):
            gradient = dy.values(at, kind) if dy is not None else None
            if dtype == kind:
                write(view.values(at, kind), view.truths(at), gradient, written[at])
            else:
                written[at] = rounded(write(view.values(at, kind), view.truths(at), gradient, None), dtype)
        return written

    def _takes(self, view: View, dy: View | None) -> bool:
        return self.kernels.takes(view.x, view.mask) and (dy is None or dy.x.dtype == view.x.dtype)

    def _pieces(self, view: View) -> list[slice]:
        """The pieces of a batch, along A; one at least."""
        rows, size = view.x.shape[0], view.x.size
        step = max(1, self._piece * rows // max(1, size))
        return [slice(at, at + step) for at in range(0, rows, step)] or [ALL_ROWS]


_installed: Passes | None = None


def passes() -> Passes:
    """The passes of this process's kernels."""
    if _installed is not None:
        return _installed
    installed: Any = kernels()
    return _of(installed)


def passes_of(view: View) -> Any:
    """The passes over a batch: this process's, or those that its view brings for where it lies."""
    return passes() if view.passes is None else view.passes


def install(passes: Passes | None) -> Passes | None:
    """Have all layers of this process go by these passes; returns those before. None: by those of its kernels."""
    global _installed
    before, _installed = _installed, passes
    return before


@cache
def _of(kernels: Any) -> Passes:
    return Passes(kernels)


def _largest(keys: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return keys[0] if len(keys) == 1 else np.maximum.reduce(keys)


def _pooled(parts: list[NDArray[np.int64]], *, flags: int) -> NDArray[np.int64]:
    """The limbs of all pieces: sums added and carried, counts added, flags joined.

    Args:
        parts: (W, C) each.
        flags: how many of the last rows are flags.
    """
    if len(parts) == 1:
        return parts[0]
    total = np.add.reduce(parts)
    total[-flags:] = np.bitwise_or.reduce([part[-flags:] for part in parts])
    for row in range(0, total.shape[0] - 2, 2):
        total[row], total[row + 1] = carried(total[row], total[row + 1])
    return np.asarray(total, np.int64)
