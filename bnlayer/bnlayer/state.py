"""`LayerState`: what the owner of a layer owns. It travels: to a joining rank, to the owner, to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer import moving
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moments import BatchStatistics


@dataclass(frozen=True, eq=False)
class LayerState:
    """The authoritative moving statistics and grids of one layer.

    Attributes:
        moving_mean, moving_variance: (C,), the variable dtype.
        forward, backward: the grids.
        version: completed forward exchanges, and replacements, since the layer was made.
    """

    moving_mean: NDArray[np.floating]
    moving_variance: NDArray[np.floating]
    forward: Grid
    backward: BackwardGrid
    version: int = 0

    @property
    def channels(self) -> int:
        """C."""
        return int(self.moving_mean.shape[0])

    def after_forward(
        self, statistics: BatchStatistics, grid: Grid, momentum: float, *, synchronized: bool, masked: bool
    ) -> LayerState:
        """The state after one completed forward exchange: updated once, its grid committed."""
        mean, variance = moving.update(
            self.moving_mean,
            self.moving_variance,
            statistics,
            momentum,
            synchronized=synchronized,
            masked=masked,
        )
        if grid is self.forward:
            backward = self.backward
        else:
            changed = (grid.pivot_C != self.forward.pivot_C) | (grid.exponent_C != self.forward.exponent_C)
            backward = self.backward.renewed(changed)
        return LayerState(mean, variance, grid, backward, self.version + 1)

    def after_backward(self, grid: BackwardGrid, statistics: BatchStatistics) -> LayerState:
        """The state after one completed backward exchange: only the grid can have changed."""
        return replace(self, backward=grid.kept(statistics.reach))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state as named arrays, for files and the wire; `from_arrays` is the way back."""
        return {
            "moving_mean": self.moving_mean,
            "moving_variance": self.moving_variance,
            "forward.pivot": self.forward.pivot_C,
            "forward.exponent": self.forward.exponent_C,
            "backward.gradient": self.backward.gradient_C,
            "backward.deviation": self.backward.deviation_C,
            "flags": np.array([self.forward.known, self.backward.known, self.version], np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], dtype: str) -> LayerState:
        """The state that `arrays()` named.

        Args:
            arrays: all entries of `arrays()`.
            dtype: of the arithmetic, "float32" or "float64".

        Raises:
            ValueError: an array is missing, or has another shape or dtype than it must have.
        """
        mean = arrays.get("moving_mean")
        shape = mean.shape if mean is not None else (0,)
        expected: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "moving_mean": (shape, np.floating),
            "moving_variance": (shape, np.floating),
            "forward.pivot": (shape, np.float64),
            "forward.exponent": (shape, np.int64),
            "backward.gradient": (shape, np.int64),
            "backward.deviation": (shape, np.int64),
            "flags": ((3,), np.int64),
        }
        for name, (want, kind) in expected.items():
            array = arrays.get(name)
            if array is None:
                raise ValueError(
                    f"The state of a layer lacks {name!r}; it has {', '.join(sorted(arrays)) or 'nothing'}."
                )
            if array.ndim != 1 or array.shape != want or not np.issubdtype(array.dtype, kind):
                raise ValueError(
                    f"The state of a layer: expected {name!r} of shape {want} and type {kind.__name__}, "
                    f"received shape {array.shape} and dtype {array.dtype}."
                )
        forward_known, backward_known, version = arrays["flags"].tolist()
        return cls(
            arrays["moving_mean"],
            arrays["moving_variance"],
            Grid(dtype, arrays["forward.pivot"], arrays["forward.exponent"], bool(forward_known)),
            BackwardGrid(dtype, arrays["backward.gradient"], arrays["backward.deviation"], bool(backward_known)),
            version,
        )
