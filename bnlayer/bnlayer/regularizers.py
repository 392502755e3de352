"""Penalties on gamma and beta, with their derivatives. Keras's factors: l1·Σ|w| + l2·Σw².

Keras's OrthogonalRegularizer is for matrices, and refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.arguments import number
from bnlayer.plain import plain_array
from bnlayer.serialization import resolve


@dataclass(frozen=True)
class L1L2:
    """l1·Σ|w| + l2·Σw²."""

    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        for name, factor in (("l1", self.l1), ("l2", self.l2)):
            if not (np.isfinite(number(f"Regularizer: {name}", factor)) and factor >= 0):
                raise ValueError(f"Regularizer: expected a finite {name} >= 0, received {factor!r}.")

    def __call__(self, w: NDArray[Any]) -> float:
        """The penalty, computed in float64."""
        w = w.astype(np.float64)
        return float(self.l1 * np.abs(w).sum() + self.l2 * np.square(w).sum())

    def gradient(self, w: NDArray[Any]) -> NDArray[Any]:
        """l1·sign(w) + 2·l2·w, of w's shape and dtype."""
        wide = w.astype(np.float64)
        return (self.l1 * np.sign(wide) + 2.0 * self.l2 * wide).astype(w.dtype)

    def get_config(self) -> dict[str, Any]:
        """`l1` and `l2`."""
        return asdict(self)


class L1(L1L2):
    """l1·Σ|w|."""

    def __init__(self, l1: float | None = 0.01) -> None:
        super().__init__(l1=0.01 if l1 is None else l1)

    def get_config(self) -> dict[str, Any]:
        """`l1`."""
        return {"l1": self.l1}


class L2(L1L2):
    """l2·Σw²."""

    def __init__(self, l2: float | None = 0.01) -> None:
        super().__init__(l2=0.01 if l2 is None else l2)

    def get_config(self) -> dict[str, Any]:
        """`l2`."""
        return {"l2": self.l2}


@dataclass(frozen=True)
class _Called:
    function: Callable[..., Any]

    def __call__(self, w: NDArray[Any]) -> float:
        return float(self.function(w))

    def gradient(self, w: NDArray[Any]) -> NDArray[Any]:
        """The function's own `gradient(w)`, if it has one.

        Raises:
            ValueError: it has none; a penalty without a derivative counts in `losses` and can't train.
        """
        derivative = getattr(self.function, "gradient", None)
        if derivative is None:
            raise ValueError(
                f"Regularizer {self.function!r} has no method gradient(w): it counts in `losses`, but its gradient "
                "is unknown. Give it one, or use 'l1', 'l2' or 'l1_l2'."
            )
        gradient = plain_array(derivative(w), f"the gradient of {self.function!r}").astype(w.dtype, copy=False)
        if gradient.shape != w.shape:
            raise ValueError(
                f"Regularizer {self.function!r}: expected a gradient of shape {w.shape}, received {gradient.shape}."
            )
        return gradient


Regularizer = L1L2 | _Called

_REGULARIZERS: dict[str, Callable[..., Regularizer]] = {"L1": L1, "L2": L2, "L1L2": L1L2}


def get(value: Any) -> Regularizer | None:
    """The regularizer that a value names; None for None.

    Raises:
        ValueError: unknown.
    """
    return resolve(value, _REGULARIZERS, "regularizer", call=_Called, aliases={"l1_l2": "L1L2"})
