"""The passes over the data, chosen once: everything that touches every element is here.

A kernel set has the functions of `reference`. Arrays come as (A, C, B): the axes before the channel axis, the channels,
the axes after it. Masks broadcast to that. Sums leave as plain int64 limbs. All sets give the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels.choice import REFERENCE, chosen, threads
from bnlayer.kernels.results import BatchStatistics, CallSettings, Gradients, PulledBack, Trained, TrainingCall

_Array = NDArray[Any]
_Limbs = NDArray[np.int64]
_Mask = NDArray[np.bool_] | None


class Kernels(Protocol):
    """A kernel set: what `reference` has."""

    @property
    def name(self) -> str:
        """As it is shown."""

    def takes(self, x: _Array, mask: _Mask) -> bool:
        """Whether the passes take a batch as it is."""

    def probe(self, x: _Array, mask: _Mask, grid: Grid) -> _Limbs:
        """See `reference.probe`."""

    def moments(self, x: _Array, mask: _Mask, grid: Grid) -> _Limbs:
        """See `reference.moments`."""

    def normalize(
        self,
        x: _Array,
        mean_C: _Array,
        scale_C: _Array,
        shift_C: _Array,
        nonfinite_C: _Array,
        out: _Array | None = None,
    ) -> _Array:
        """See `reference.normalize`."""

    def gradient_probe(self, dy: _Array, x: _Array, pivot_C: _Array, grid: BackwardGrid) -> _Limbs:
        """See `reference.gradient_probe`."""

    def gradient_sums(
        self, dy: _Array, x: _Array, mask: _Mask, pivot_C: _Array, grid: BackwardGrid, *, fits: bool = False
    ) -> _Limbs:
        """See `reference.gradient_sums`."""

    def input_gradient(
        self, dy: _Array, x: _Array, mask: _Mask, mean_C: _Array, offset_C: _Array, slope_C: _Array, scale_C: _Array,
        nonfinite_C: _Array, out: _Array | None = None,
    ) -> _Array:  # fmt: skip
        """See `reference.input_gradient`."""

    def statistics(
        self, limbs: _Limbs, grid: Grid, epsilon: float, e: float
    ) -> tuple[BatchStatistics, NDArray[np.bool_] | None]:
        """See `formulas.statistics`."""

    def moved(
        self, statistics: BatchStatistics, old_mean: _Array, old_variance: _Array, momentum: float, *,
        synchronized: bool, masked: bool, unbiased: bool = False,
    ) -> tuple[_Array, _Array]:  # fmt: skip
        """See `formulas.moved`."""

    def coefficients(
        self, statistics: BatchStatistics, gamma: _Array | None, beta: _Array | None, dtype: np.dtype[Any]
    ) -> tuple[_Array, _Array]:
        """See `formulas.coefficients`."""

    def gradients(
        self, limbs: _Limbs, grid: BackwardGrid, forward: BatchStatistics
    ) -> tuple[Gradients, NDArray[np.bool_] | None]:
        """See `formulas.gradients`."""

    def finish_forward(
        self, x: _Array, limbs: _Limbs, grid: Grid, call: TrainingCall, *, accepted: bool
    ) -> Trained | None:
        """`statistics`, `moved`, `coefficients` and `normalize` in one; None: not for this call."""

    def finish_backward(
        self, dy: _Array, x: _Array, mask: _Mask, limbs: _Limbs, grid: BackwardGrid, forward: BatchStatistics,
        scale_C: _Array, *, accepted: bool,
    ) -> PulledBack | None:  # fmt: skip
        """`gradients` and `input_gradient` in one; None: not for this call."""

    def has_calls_alone(self, arithmetic: np.dtype[Any], variables: np.dtype[Any]) -> bool:
        """Whether the next two are for layers of these dtypes."""

    def train_alone(
        self, x: _Array, shape: tuple[int, ...], grid: Grid, gamma: _Array | None, beta: _Array | None,
        mean: _Array, variance: _Array, settings: CallSettings, /,
    ) -> tuple[_Array, _Array, _Array, NDArray[np.uint8], bytes] | None:  # fmt: skip
        """A training call of a world of one; None: refused. See `compiled.Compiled`."""

    def pull_alone(
        self, dy: _Array, x: _Array, mask: _Mask, seen: bytes | None, shape: tuple[int, ...], grid: BackwardGrid,
        record: NDArray[np.uint8], scale: bool, center: bool, /,
    ) -> tuple[_Array, _Array | None, _Array | None] | None:  # fmt: skip
        """Its backward pass; None: refused."""

    def sample(self, x: _Array) -> bytes:
        """See `formulas.sample`."""

    def forward_at(
        self, shape: tuple[int, int, int], x: int, y: int, affine: bool, weights: tuple[int, ...], grid: Grid,
        epsilon: float, momentum: float, unbiased: bool, before: NDArray[np.uint8], record: NDArray[np.uint8], /,
    ) -> bool:  # fmt: skip
        """A training call of a world of one on addresses; False: not for this call. See `compiled.Compiled`."""

    def backward_at(
        self, shape: tuple[int, int, int], x: int, dy: int, dx: int, gradients: tuple[int, int],
        record: NDArray[np.uint8], grid: BackwardGrid, /,
    ) -> bool:  # fmt: skip
        """Its backward pass; False: not for this call."""


@cache
def kernels() -> Kernels:
    """The kernel set of this process: see `choice.chosen`."""
    name = chosen()
    if name == REFERENCE:
        from bnlayer.kernels import reference

        return reference
    from bnlayer.kernels.compiled import Compiled

    return Compiled(name, threads())
