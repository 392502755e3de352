"""What a call saves for its backward pass, and that pass.

A training call saves its batch, the global batch's statistics, and the exchange driver that it used, so any number of
calls can wait for their gradients and be pulled back in any order. The grid, which changes from one backward pass to
the next, belongs to the layer.

Shape suffixes: C channels; batches are (A, C, B).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.collective import LayerSignature
from bnlayer.exchange_driver import Changes, ExchangeDriver, share
from bnlayer.gradients import Gradients
from bnlayer.grid import BackwardGrid
from bnlayer.kernels.results import BatchStatistics, Record
from bnlayer.tiling import passes, passes_of
from bnlayer.view import View

# Takes dy; returns dinputs, dgamma and dbeta.
Pullback = Callable[[ArrayLike], tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]]


@dataclass(eq=False, slots=True)
class Pulled:
    """The result of a backward pass.

    Attributes:
        dx: of the batch's own shape.
        gamma, beta: (C,) float64.
        grid: the one that the layer's next backward pass starts from.
    """

    dx: NDArray[Any]
    gamma: NDArray[np.float64]
    beta: NDArray[np.float64]
    grid: BackwardGrid


@dataclass(eq=False, slots=True)
class SavedTraining:
    """What a training call saves.

    Attributes:
        driver: of the ranks that took part in the forward exchange.
        signature: as it was then.
        step: the call's, among the training calls of these ranks.
        view: the batch, in the caller's memory.
        seen: a sample of it, taken at the call.
        batch_statistics: the statistics of the global batch.
        scale: γs, or γrs with renorm: what multiplies the centered input; None: γs, and the record has it.
        r_C, d_C: the corrections of renorm; None without.
    """

    driver: ExchangeDriver
    signature: LayerSignature
    step: int
    view: View
    seen: bytes
    batch_statistics: BatchStatistics | Record
    scale: NDArray[Any] | None
    r_C: NDArray[np.float64] | None
    d_C: NDArray[np.float64] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        return self.view.shape

    @property
    def statistics(self) -> BatchStatistics:
        """Of the global batch."""
        return self.batch_statistics.statistics if isinstance(self.batch_statistics, Record) else self.batch_statistics

    @property
    def scale_C(self) -> NDArray[Any]:
        """What multiplies the centered input."""
        if self.scale is None:
            assert isinstance(self.batch_statistics, Record)
            return self.batch_statistics.scale
        return self.scale

    @property
    def was_written_to(self) -> bool:
        """Whether the sampled values differ from those at the call."""
        return passes().kernels.sample(self.view.x) != self.seen

    def pull_alone(
        self, dy: Any, grid: BackwardGrid, scale: bool, center: bool
    ) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None] | None:
        """The gradients of the inputs, gamma and beta in a world of one; None: `pull` gives them.

        Where nobody is to be agreed with, this rank's share of the gradients is all of them.
        """
        view, record = self.view, self.batch_statistics
        if not (self.driver.alone and grid.is_probed and isinstance(record, Record) and dy.dtype is view.x.dtype):
            return None
        x, memory = view.x, record.memory
        pulled = passes().kernels.pull_alone(
            dy.reshape(x.shape), x, view.mask, None, view.shape, grid, memory, scale, center
        )
        if pulled is not None:
            self.driver.pulled_alone()
        return pulled

    def pull(
        self,
        dy: NDArray[Any],
        grid: BackwardGrid,
        reduction: Literal["global", "local"],
        dtype: np.dtype[Any],
        changes: Changes | None = None,
    ) -> Pulled:
        """Agree with the other ranks on the sums of dy, and write the gradient of the inputs, rounded to `dtype`."""
        view, statistics, scale_C = self.view, self.statistics, self.scale_C
        seen = view.alike(dy)
        dx = None

        def finish(
            limbs: NDArray[np.int64], grid: BackwardGrid, accepted: bool
        ) -> tuple[Gradients, NDArray[np.bool_] | None]:
            nonlocal dx
            arguments = seen, view, limbs, grid, statistics, scale_C, dtype
            gradients, refused, dx = passes().finish_backward(*arguments, accepted=accepted)
            return gradients, refused

        in_one = finish if view.passes is None else None
        result = self.driver.backward(seen, view, self.signature, statistics, self.step, grid, changes, finish=in_one)
        total = result.total
        summed = total if reduction == "global" else share(result, statistics)
        gamma = summed.gamma
        if self.r_C is not None and self.d_C is not None:
            # With renorm the output is γ·(x̂·r + d) + β, and neither r nor d is differentiated.
            gamma = gamma * self.r_C + summed.beta * self.d_C
        if dx is None:
            coefficients = statistics.rounded_mean, total.rounded_offset, total.rounded_slope, scale_C
            dx = passes_of(view).input_gradient(seen, view, *coefficients, total.nonfinite, dtype)
        return Pulled(view.restore(dx), gamma, summed.beta, result.grid)


@dataclass(eq=False, slots=True)
class SavedInference:
    """What a call in inference mode saves: dx = scale·dy, whatever the batch was.

    Attributes:
        shape: of the output.
        flat: the same as (A, C, B).
        scale_C: γ/√(moving_variance + ε).
    """

    shape: tuple[int, ...]
    flat: tuple[int, ...]
    scale_C: NDArray[Any]

    def pull(self, dy: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The gradient of the inputs, rounded to `dtype`."""
        view = View(dy.reshape(self.flat), None, self.shape)
        return view.restore(passes().scaled(view, self.scale_C, dtype))
