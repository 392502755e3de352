"""Projections of gamma and beta, applied by the optimizer after each update, never by a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.plain import plain_array
from bnlayer.serialization import resolve

_EPSILON = 1e-7  # Keras's `backend.epsilon()`: a norm of 0 stays divisible


@dataclass(frozen=True)
class NonNeg:
    """w where w ≥ 0, else 0."""

    def __call__(self, w: NDArray[Any]) -> NDArray[Any]:
        """The projected vector."""
        return np.where(w >= 0, w, np.zeros_like(w))

    def get_config(self) -> dict[str, Any]:
        """No arguments."""
        return {}


@dataclass(frozen=True)
class MaxNorm:
    """w scaled down so that its Euclidean norm along `axis` is at most `max_value`."""

    max_value: float = 2.0
    axis: int = 0

    def __call__(self, w: NDArray[Any]) -> NDArray[Any]:
        """The scaled vector."""
        norms = np.sqrt(np.square(w).sum(axis=self.axis, keepdims=True))
        scaled = w * (np.clip(norms, 0, self.max_value) / (_EPSILON + norms))
        return np.asarray(scaled, w.dtype)

    def get_config(self) -> dict[str, Any]:
        """`max_value` and `axis`."""
        return asdict(self)


@dataclass(frozen=True)
class UnitNorm:
    """w scaled so that its Euclidean norm along `axis` is 1."""

    axis: int = 0

    def __call__(self, w: NDArray[Any]) -> NDArray[Any]:
        """The scaled vector."""
        return np.asarray(w / (_EPSILON + np.sqrt(np.square(w).sum(axis=self.axis, keepdims=True))), w.dtype)

    def get_config(self) -> dict[str, Any]:
        """`axis`."""
        return asdict(self)


@dataclass(frozen=True)
class MinMaxNorm:
    """w scaled towards a Euclidean norm between `min_value` and `max_value`, by `rate` of the way."""

    min_value: float = 0.0
    max_value: float = 1.0
    rate: float = 1.0
    axis: int = 0

    def __call__(self, w: NDArray[Any]) -> NDArray[Any]:
        """The scaled vector."""
        norms = np.sqrt(np.square(w).sum(axis=self.axis, keepdims=True))
        desired = self.rate * np.clip(norms, self.min_value, self.max_value) + (1 - self.rate) * norms
        return np.asarray(w * (desired / (_EPSILON + norms)), w.dtype)

    def get_config(self) -> dict[str, Any]:
        """`min_value`, `max_value`, `rate`, `axis`."""
        return asdict(self)


@dataclass(frozen=True)
class _Called:
    function: Callable[..., Any]

    def __call__(self, w: NDArray[Any]) -> NDArray[Any]:
        projected = plain_array(self.function(w), f"the value of constraint {self.function!r}").astype(
            w.dtype, copy=False
        )
        if projected.shape != w.shape:
            raise ValueError(f"Constraint {self.function!r}: expected shape {w.shape}, received {projected.shape}.")
        return projected


Constraint = NonNeg | MaxNorm | UnitNorm | MinMaxNorm | _Called

_CONSTRAINTS: dict[str, Callable[..., Constraint]] = {
    cls.__name__: cls for cls in (NonNeg, MaxNorm, UnitNorm, MinMaxNorm)
}


def get(value: Any) -> Constraint | None:
    """The constraint that a value names; None for None.

    Raises:
        ValueError: unknown.
    """
    return resolve(value, _CONSTRAINTS, "constraint", call=_Called)
