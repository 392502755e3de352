"""Initial values of the layer's vectors. The random ones of Keras are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.serialization import resolve


@dataclass(frozen=True)
class Zeros:
    """All 0."""

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of the shape and dtype."""
        return np.zeros(shape, dtype)

    def get_config(self) -> dict[str, Any]:
        """No arguments."""
        return {}


@dataclass(frozen=True)
class Ones:
    """All 1."""

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of the shape and dtype."""
        return np.ones(shape, dtype)

    def get_config(self) -> dict[str, Any]:
        """No arguments."""
        return {}


@dataclass(frozen=True)
class Constant:
    """All `value`."""

    value: float = 0.0

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of the shape and dtype."""
        return np.full(shape, self.value, dtype)

    def get_config(self) -> dict[str, Any]:
        """`value`."""
        return asdict(self)


@dataclass(frozen=True)
class _Called:
    function: Callable[..., Any]

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        value = np.array(self.function(shape, dtype), dtype)
        if value.shape != shape:
            raise ValueError(f"Initializer {self.function!r}: expected shape {shape}, received {value.shape}.")
        return value


Initializer = Zeros | Ones | Constant | _Called

_KNOWN: dict[str, Callable[..., Initializer]] = {"Zeros": Zeros, "Ones": Ones, "Constant": Constant}


def get(value: Any) -> Initializer:
    """The initializer that a value names.

    Raises:
        ValueError: unknown, or None.
    """
    found = resolve(value, _KNOWN, "initializer", call=_Called)
    if found is None:
        raise ValueError("Expected an initializer, received None.")
    return found
