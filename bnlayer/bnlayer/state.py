"""`LayerState`: a layer's moving statistics and grids, as its owner keeps them and as they are sent and saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.dtypes import is_real
from bnlayer.fingerprint import fingerprint
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels.results import BatchStatistics
from bnlayer.moving import Moving, Rule, update

_OF_RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")


@dataclass(frozen=True, eq=False, repr=False)
class LayerState:
    """The authoritative moving statistics and grids of one layer.

    Attributes:
        moving: the moving statistics.
        forward, backward: the grids.
        version: completed forward exchanges, and replacements, since the layer was made.
    """

    moving: Moving
    forward: Grid
    backward: BackwardGrid
    version: int = 0

    @property
    def channels(self) -> int:
        """C."""
        return int(self.moving.mean.shape[0])

    @property
    def kind(self) -> str:
        """What two states must have in common for one to replace the other, as text."""
        renorm = " and renorm" if self.moving.stddev is not None else ""
        variables = f"{self.moving.mean.dtype.name} variables{renorm}"
        return f"{self.channels} channels in {self.forward.dtype} with {variables}"

    def __repr__(self) -> str:
        return f"<LayerState of {self.kind}, version {self.version}>"

    @property
    def fingerprint(self) -> int:
        """Hash of everything but the version, never 0: states with equal fingerprints are interchangeable."""
        return fingerprint(replace(self, version=0).arrays())

    def refuse_nonfinite(self, layer: str) -> None:
        """Refuse moving statistics that a synchronized layer, which leaves such a channel alone, would keep for good.

        Args:
            layer: its name, for the error.

        Raises:
            ValueError: one is NaN or infinite.
        """
        for name, vector in self.moving.vectors.items():
            bad = np.flatnonzero(~np.isfinite(vector))
            if bad.size:
                raise ValueError(
                    f"Layer {layer!r}: expected finite numbers in {name}, received {vector[bad[0]]} in channel "
                    f"{bad[0]}: in a synchronized layer they would stay so. Set finite ones, or reset them."
                )

    def after_forward(self, statistics: BatchStatistics, grid: Grid, rule: Rule | Moving | None) -> LayerState:
        """The state after one completed forward exchange: updated once, its grid committed.

        Args:
            statistics: of the batch.
            grid: the one that its sums were accepted on.
            rule: how the moving statistics follow, or what they are then, where that is known already; None: the call
                updates nothing, as if it had not been made, but a layer without a grid still takes this one: otherwise
                it would probe at each such call.
        """
        if rule is None and self.forward.is_probed:
            return self
        if grid is self.forward:
            backward = self.backward
        else:
            changed = (grid.pivot_C != self.forward.pivot_C) | (grid.exponent_C != self.forward.exponent_C)
            backward = self.backward.renewed(changed)
        if rule is None:
            return LayerState(self.moving, grid, backward, self.version)
        moving = rule if isinstance(rule, Moving) else update(self.moving, statistics, rule)
        return LayerState(moving, grid, backward, self.version + 1)

    def moved_to(self, moving: Moving, exchanges: int) -> LayerState:
        """The state after some forward exchanges on the kept grid, whose moving statistics are known already."""
        return LayerState(moving, self.forward, self.backward, self.version + exchanges)

    def after_backward(self, grid: BackwardGrid) -> LayerState:
        """The state after one completed backward exchange: only the grid can have changed."""
        return self if grid is self.backward else replace(self, backward=grid)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state as named arrays, for files and the wire; `from_arrays` is the way back."""
        return {
            **self.moving.vectors,
            "forward.pivot": self.forward.pivot_C,
            "forward.exponent": self.forward.exponent_C,
            "backward.gradient": self.backward.gradient_C,
            "backward.deviation": self.backward.deviation_C,
            "flags": np.array([self.forward.is_probed, self.backward.is_probed, self.version], np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], dtype: str) -> LayerState:
        """The state from which `arrays()` made the arrays.

        Args:
            arrays: all entries of `arrays()`.
            dtype: of the arithmetic, "float32" or "float64".

        Raises:
            ValueError: an array is missing, or has a wrong shape or dtype.
        """
        mean = arrays.get("moving_mean")
        shape = mean.shape if mean is not None else (0,)
        variables = ["moving_mean", "moving_variance"]
        if any(name in arrays for name in _OF_RENORM):
            variables += _OF_RENORM
        for name in variables:
            _check(arrays, name, shape, mean.dtype if mean is not None else np.dtype(np.float32))
        for name, kind in (
            ("forward.pivot", np.float64),
            ("forward.exponent", np.int64),
            ("backward.gradient", np.int64),
            ("backward.deviation", np.int64),
        ):
            _check(arrays, name, shape, np.dtype(kind))
        _check(arrays, "flags", (3,), np.dtype(np.int64))
        forward_probed, backward_probed, version = arrays["flags"].tolist()
        arrays = {name: np.require(array, requirements="W") for name, array in arrays.items()}  # not a message's buffer
        return cls(
            Moving(*(arrays[name] for name in variables)),
            Grid(dtype, arrays["forward.pivot"], arrays["forward.exponent"], bool(forward_probed)),
            BackwardGrid(dtype, arrays["backward.gradient"], arrays["backward.deviation"], bool(backward_probed)),
            version,
        )


def _check(arrays: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    array = arrays.get(name)
    if array is None:
        raise ValueError(f"The state of a layer lacks {name!r}; it has {', '.join(sorted(arrays)) or 'nothing'}.")
    real = is_real(array.dtype) and array.dtype.kind not in "iub"
    if array.ndim != 1 or array.shape != shape or array.dtype != dtype or (name == "moving_mean" and not real):
        expected = "a float dtype" if name == "moving_mean" else f"dtype {dtype}"
        raise ValueError(
            f"The state of a layer: expected {name!r} of shape {shape} and {expected}, "
            f"received shape {array.shape} and dtype {array.dtype}."
        )
