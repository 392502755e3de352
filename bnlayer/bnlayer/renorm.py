"""Batch renormalization: normalizing with corrections towards slowly moving statistics.

    r = stddev / renorm_stddev        d = (μ − renorm_mean) / renorm_stddev        both clipped, neither differentiated
    y = γ·(x̂·r + d) + β

with stddev = √(v + ε) of the global batch and renorm_stddev at least √ε. The corrections come from the statistics as
they were before the call.

Source: Ioffe, "Batch Renormalization" (2017); Keras 3.15.1, whose error text prints `{rmax}` where ours prints numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bnlayer.arguments import number
from bnlayer.kernels.results import BatchStatistics

_KEYS = ("rmax", "rmin", "dmax")


@dataclass(frozen=True, slots=True)
class Renorm:
    """How a layer renormalizes; every rank must say the same.

    Attributes:
        momentum: weight of the old value in the update of renorm_mean and renorm_stddev.
        rmax, rmin, dmax: r is clipped to [rmin, rmax], d to [−dmax, dmax]; None: not clipped there.
    """

    momentum: float = 0.99
    rmax: float | None = None
    rmin: float | None = None
    dmax: float | None = None

    @classmethod
    def of(cls, momentum: float, clipping: Mapping[str, float] | None) -> Renorm:
        """From the layer's arguments.

        Raises:
            ValueError: an unknown key, rmax below rmin, or a negative dmax.
        """
        clipping = clipping or {}
        if set(clipping) - set(_KEYS):
            raise ValueError(
                f"Received invalid keys for `renorm_clipping` argument: {dict(clipping)}. "
                f"Supported values: {list(_KEYS)}."
            )
        for key, value in clipping.items():
            if value is not None:
                number(f"renorm_clipping[{key!r}]", value)
        rmax, rmin, dmax = (clipping.get(key) for key in _KEYS)
        if rmax is not None and rmin is not None and rmax < rmin:
            raise ValueError(
                "rmax should be greater than rmin in the `renorm_clipping` argument. "
                f"Received: rmax={rmax}, rmin={rmin}."
            )
        if dmax is not None and dmax < 0:
            raise ValueError(f"dmax should be non-negative in the `renorm_clipping` argument. Received: dmax={dmax}.")
        return cls(momentum, rmax, rmin, dmax)

    def correction(
        self,
        statistics: BatchStatistics,
        renorm_mean: NDArray[np.floating],
        renorm_stddev: NDArray[np.floating],
        epsilon: float,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """r and d, each (C,) float64."""
        slow = np.maximum(renorm_stddev.astype(np.float64), np.sqrt(epsilon))
        r = np.sqrt(statistics.variance + epsilon) / slow
        d = (statistics.mean - renorm_mean.astype(np.float64)) / slow
        if self.rmin is not None:
            r = np.maximum(r, self.rmin)
        if self.rmax is not None:
            r = np.minimum(r, self.rmax)
        if self.dmax is not None:
            d = np.clip(d, -self.dmax, self.dmax)
        return r, d
