"""One exchange, as every rank and the owner see it: [probe,] sums [, probe, sums].

Laws:
1. The next step is a pure function of the limbs reduced so far: ranks and owner take the same one without a message.
2. At most one probe per exchange: a channel just probed is accepted.
3. Nothing is committed before the sums are accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bnlayer.collective import Operation
from bnlayer.gradients import Gradients, GradientSums
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels.results import BatchStatistics
from bnlayer.moments import Moments

# Of the totals, their grid, and whether they are accepted whatever they show: what follows, and the refused channels.
_Refused = NDArray[np.bool_] | None
ForwardFinish = Callable[[NDArray[np.int64], Grid, bool], tuple[BatchStatistics, _Refused]]
BackwardFinish = Callable[[NDArray[np.int64], BackwardGrid, bool], tuple[Gradients, _Refused]]


@dataclass(frozen=True, eq=False)
class ForwardExchange:
    """Agreeing on a batch's statistics.

    Attributes:
        grid: the grid in force.
        epsilon: the layer's.
        masked: whether the call has a mask.
        need_C: the channels that the next probe regrids, or the last one did.
        wants: the next operation; None once the moments are accepted.
        attempt: operations so far.
        moments: the accepted ones, of all ranks.
        statistics: computed from them; None before.
    """

    grid: Grid
    epsilon: float
    masked: bool
    need_C: NDArray[np.bool_]
    wants: Operation | None
    attempt: int = 0
    moments: Moments | None = None
    statistics: BatchStatistics | None = None

    @classmethod
    def begin(cls, grid: Grid, epsilon: float, masked: bool) -> ForwardExchange:
        """The exchange before its first operation."""
        need = np.zeros(grid.pivot_C.shape, bool) if grid.is_probed else np.ones(grid.pivot_C.shape, bool)
        return cls(grid, epsilon, masked, need, Operation.SUMS if grid.is_probed else Operation.PROBE)

    @property
    def rows(self) -> int:
        """How many limbs per channel the next contribution has."""
        return 2 if self.wants is Operation.PROBE else Moments.rows(self.grid.precision.folds)

    @property
    def fingerprint(self) -> int:
        """`LayerSignature.grid` of the next contribution: the grid's fingerprint for sums, 0 otherwise."""
        return self.grid.fingerprint if self.wants is Operation.SUMS else 0

    @property
    def accepts(self) -> bool:
        """Whether sums are accepted whatever they show: a probe has just been made."""
        return self.attempt > 0

    def reduced(self, limbs: NDArray[np.int64], finish: ForwardFinish | None = None) -> ForwardExchange:
        """The exchange after the limbs of all ranks were reduced.

        Args:
            limbs: the totals.
            finish: computes the statistics from sums, and whatever else follows from them in the same pass.
        """
        if self.wants is Operation.PROBE:
            grid = self.grid.probed(limbs, self.need_C)
            return ForwardExchange(grid, self.epsilon, self.masked, self.need_C, Operation.SUMS, self.attempt + 1)
        moments = Moments(limbs, self.grid)
        if finish is not None:
            statistics, channels_to_probe = finish(limbs, self.grid, self.accepts)
        else:
            statistics, channels_to_probe = moments.check_window(self.epsilon, self.masked)
        if channels_to_probe is not None and not self.accepts:
            return ForwardExchange(
                self.grid, self.epsilon, self.masked, channels_to_probe, Operation.PROBE, self.attempt + 1
            )
        return ForwardExchange(
            self.grid, self.epsilon, self.masked, self.need_C, None, self.attempt + 1, moments, statistics
        )


@dataclass(frozen=True, eq=False)
class BackwardExchange:
    """Agreeing on a batch's gradient sums.

    What comes next follows from the kept grid and the reduced limbs alone: ranks put what that takes of the training
    call into their limbs (`GradientSums.of_call`, `beyond_reach`). So an owner stores no calls, however many wait for
    their gradients.

    Attributes:
        grid: the grid in force, as it is kept.
        statistics: of the training call whose gradients these are; None at the owner.
        need_C: the channels that the next probe regrids, or the last one did.
        wants: the next operation; None once the sums are accepted.
        attempt: operations so far.
        gradients: from the accepted sums; None before, and at the owner, which has no statistics of the call.
    """

    grid: BackwardGrid
    statistics: BatchStatistics | None
    need_C: NDArray[np.bool_]
    wants: Operation | None
    attempt: int = 0
    gradients: Gradients | None = None

    @classmethod
    def begin(cls, grid: BackwardGrid, statistics: BatchStatistics | None) -> BackwardExchange:
        """The exchange before its first operation."""
        need = np.zeros(grid.gradient_C.shape, bool) if grid.is_probed else np.ones(grid.gradient_C.shape, bool)
        wants = Operation.SUMS if grid.is_probed else Operation.PROBE
        return cls(grid, statistics, need, wants)

    @cached_property
    def call_grid(self) -> BackwardGrid:
        """The grid whose units a rank's limbs count: the kept one, as wide as its training call's batch."""
        return self.grid if self.statistics is None else self.grid.reaching(self.statistics.reach)

    def beyond_reach(self, exponents: NDArray[np.int64]) -> NDArray[np.int64]:
        """A rank's probe, with only those exponents of |x − p| that lie beyond the batch's reach."""
        if self.statistics is None:
            return exponents
        lowest = self.grid.precision.lowest
        return np.stack([exponents[0], np.where(exponents[1] > self.statistics.reach, exponents[1], lowest)])

    @property
    def rows(self) -> int:
        """How many limbs per channel the next contribution has."""
        return 2 if self.wants is Operation.PROBE else GradientSums.rows(self.grid.precision.folds)

    @property
    def fingerprint(self) -> int:
        """`LayerSignature.grid` of the next contribution: the grid's fingerprint for sums, 0 otherwise."""
        return self.grid.fingerprint if self.wants is Operation.SUMS else 0

    @property
    def accepts(self) -> bool:
        """Whether sums are accepted whatever they show: a probe has just been made."""
        return self.attempt > 0

    def reduced(self, limbs: NDArray[np.int64], finish: BackwardFinish | None = None) -> BackwardExchange:
        """The exchange after the limbs of all ranks were reduced; `finish` as in `ForwardExchange.reduced`."""
        if self.wants is Operation.PROBE:
            grid = self.grid.probed(limbs, self.need_C)
            return BackwardExchange(grid, self.statistics, self.need_C, Operation.SUMS, self.attempt + 1)
        if finish is not None:
            outcome: tuple[Gradients | None, _Refused] = finish(limbs, self.call_grid, self.accepts)
        else:
            outcome = self._check(limbs)
        gradients, channels_to_probe = outcome
        if channels_to_probe is not None and not self.accepts:
            return BackwardExchange(self.grid, self.statistics, channels_to_probe, Operation.PROBE, self.attempt + 1)
        return BackwardExchange(self.grid, self.statistics, self.need_C, None, self.attempt + 1, gradients)

    def _check(self, limbs: NDArray[np.int64]) -> tuple[Gradients | None, NDArray[np.bool_] | None]:
        sums = GradientSums(limbs, self.call_grid)
        return sums.check_window(self.statistics) if self.statistics is not None else (None, sums.refused())
