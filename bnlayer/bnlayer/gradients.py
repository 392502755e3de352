"""`GradientSums`: the exact Σ dy and Σ dy·(x − p) of a batch, and the coefficients of the input gradient.

Both sums run over ALL positions, masked ones included: a masked output depends on the mean and variance too.

Shape suffixes: C channels, W limbs: per fold A_hi, A_lo; per fold B_hi, B_lo; two limbs of flags.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bnlayer.grid import BackwardGrid
from bnlayer.kernels import formulas, kernels
from bnlayer.kernels.results import BatchStatistics, Gradients
from bnlayer.limbs import limbs_of_sum, counted, flags

__all__ = ["GradientSums", "Gradients"]


@dataclass(frozen=True, eq=False)
class GradientSums:
    """Exact sums of one or more shards' output gradients on a grid.

    Attributes:
        limbs: (W, C) int64, packed.
        grid: what the limbs are in units of.
    """

    limbs: NDArray[np.int64]
    grid: BackwardGrid

    @staticmethod
    def rows(folds: int) -> int:
        """W: the number of limbs per channel."""
        return limbs_of_sum(folds)

    @property
    def out_of_range_C(self) -> NDArray[np.bool_]:
        """Whether some |dy| or |x − p| lies outside its window."""
        return counted(self.limbs[-2])[0]

    @property
    def not_finite_C(self) -> NDArray[np.bool_]:
        """Whether some unmasked dy is NaN or infinite."""
        return counted(self.limbs[-2])[1]

    def check_window(self, statistics: BatchStatistics) -> tuple[Gradients, NDArray[np.bool_] | None]:
        """The gradients, and the channels that need a new grid, (C,) bool; None if none does.

        Args:
            statistics: of the training call whose outputs the gradients belong to.
        """
        return kernels().gradients(self.limbs, self.grid, statistics)

    def refused(self) -> NDArray[np.bool_] | None:
        """The channels that need a new grid, (C,) bool; None if none does.

        A value lies outside its window; or gradients are there, and all lie 2^20-fold below it. A channel of which
        nothing finite comes asks for none: see `of_call`.
        """
        return formulas.refused_gradients(self.limbs)

    def of_call(self, nonfinite_C: NDArray[np.bool_]) -> GradientSums:
        """The sums, with the call's nonfinite channels flagged, so that the reduction does not need the call."""
        if not nonfinite_C.any():
            return self
        limbs = self.limbs.copy()
        limbs[-2] |= flags(np.zeros_like(nonfinite_C), nonfinite_C)
        return GradientSums(limbs, self.grid)
