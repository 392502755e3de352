"""Initial values of the layer's vectors: Keras's initializers, as far as a vector can take them.

The random ones draw what Keras draws on its NumPy backend from the same integer seed. Without a seed each instance
draws its own, which differs between ranks: seed the gamma and beta of ranks that train together, or broadcast
them. (Moving statistics need neither: rank 0's seed the owner.)

Source: `keras.initializers`, Keras 3.15.1. Orthogonal, Identity and STFT are for matrices, and refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod, sqrt
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bnlayer.plain import plain_array
from bnlayer.serialization import resolve

_TRUNCATED_STDDEV = 0.87962566103423978  # of a standard normal cut at ±2: Keras divides by it


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


class _Random:
    """A seed, and how Keras draws from it.

    Args:
        seed: an int; None: drawn once, here.

    Raises:
        ValueError: the seed is something else, e.g. Keras's SeedGenerator, whose state can't be shared.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**32):
            raise ValueError(
                f"{type(self).__name__}: expected an int from 0 to 2^32 - 1, or None, as seed; received {seed!r}."
            )
        self._given = seed
        self.seed = int.from_bytes(os.urandom(8), "little") % 10**9 if seed is None else seed

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), self.seed))

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(np.array([self.seed, 0], np.uint32))

    def _normal(self, shape: tuple[int, ...], mean: float, stddev: float, dtype: np.dtype[Any]) -> NDArray[Any]:
        return self._rng().normal(loc=mean, scale=stddev, size=shape).astype(dtype)

    def _uniform(self, shape: tuple[int, ...], low: float, high: float, dtype: np.dtype[Any]) -> NDArray[Any]:
        return self._rng().uniform(low=low, high=high, size=shape).astype(dtype)

    def _truncated(self, shape: tuple[int, ...], mean: float, stddev: float, dtype: np.dtype[Any]) -> NDArray[Any]:
        rng, size = self._rng(), prod(shape)
        accepted = np.empty(0)
        while accepted.size < size:
            drawn = rng.normal(loc=mean, scale=stddev, size=size)
            accepted = np.append(accepted, drawn[np.abs(drawn - mean) <= 2 * stddev])
        return accepted[:size].astype(dtype).reshape(shape)


class RandomNormal(_Random):
    """Normal numbers."""

    def __init__(self, mean: float = 0.0, stddev: float = 0.05, seed: int | None = None) -> None:
        super().__init__(seed)
        self.mean, self.stddev = mean, stddev

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of the shape and dtype."""
        return self._normal(shape, self.mean, self.stddev, dtype)

    def get_config(self) -> dict[str, Any]:
        """`seed`, `mean`, `stddev`."""
        return {"seed": self._given, "mean": self.mean, "stddev": self.stddev}


class TruncatedNormal(RandomNormal):
    """Normal numbers, those beyond two standard deviations drawn again."""

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of the shape and dtype."""
        return self._truncated(shape, self.mean, self.stddev, dtype)


class RandomUniform(_Random):
    """Numbers spread evenly over [minval, maxval)."""

    def __init__(self, minval: float = -0.05, maxval: float = 0.05, seed: int | None = None) -> None:
        super().__init__(seed)
        self.minval, self.maxval = minval, maxval

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of the shape and dtype."""
        return self._uniform(shape, self.minval, self.maxval, dtype)

    def get_config(self) -> dict[str, Any]:
        """`seed`, `minval`, `maxval`."""
        return {"seed": self._given, "minval": self.minval, "maxval": self.maxval}


class VarianceScaling(_Random):
    """Random numbers whose variance is scale / fan; a vector's fans are its length."""

    def __init__(
        self,
        scale: float = 1.0,
        mode: str = "fan_in",
        distribution: str = "truncated_normal",
        seed: int | None = None,
        input_axes: Sequence[int] | None = None,
        output_axes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(seed)
        if scale <= 0:
            raise ValueError(f"Argument `scale` must be positive float. Received: scale={scale}")
        if mode not in ("fan_in", "fan_out", "fan_avg"):
            raise ValueError(f"Invalid `mode` argument: {mode}. Please use one of fan_in, fan_out, fan_avg.")
        named = "truncated_normal" if distribution.lower() == "normal" else distribution.lower()
        if named not in ("uniform", "truncated_normal", "untruncated_normal"):
            raise ValueError(
                f"Invalid `distribution` argument: {distribution}. "
                "Please use one of uniform, truncated_normal, untruncated_normal."
            )
        self.scale, self.mode, self.distribution = scale, mode, named
        self.input_axes, self.output_axes = input_axes, output_axes

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of the shape and dtype."""
        variance = self.scale / max(1.0, self._fan(shape))
        if self.distribution == "uniform":
            limit = sqrt(3.0 * variance)
            return self._uniform(shape, -limit, limit, dtype)
        if self.distribution == "untruncated_normal":
            return self._normal(shape, 0.0, sqrt(variance), dtype)
        return self._truncated(shape, 0.0, sqrt(variance) / _TRUNCATED_STDDEV, dtype)

    def _fan(self, shape: tuple[int, ...]) -> float:
        fan_in = fan_out = float(prod(shape))
        if self.input_axes is not None and self.output_axes is not None:
            fan_in = float(prod(shape[axis] for axis in self.input_axes))
            fan_out = float(prod(shape[axis] for axis in self.output_axes))
        return {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]

    def get_config(self) -> dict[str, Any]:
        """All arguments."""
        return {
            "seed": self._given,
            "scale": self.scale,
            "mode": self.mode,
            "distribution": self.distribution,
            "input_axes": self.input_axes,
            "output_axes": self.output_axes,
        }


class _Preset(VarianceScaling):
    """A variance scaling with a name of its own."""

    preset: tuple[float, str, str]

    def __init__(
        self,
        seed: int | None = None,
        input_axes: Sequence[int] | None = None,
        output_axes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(*self.preset, seed, input_axes, output_axes)

    def get_config(self) -> dict[str, Any]:
        """`seed` and the axes."""
        return {"seed": self._given, "input_axes": self.input_axes, "output_axes": self.output_axes}


class GlorotUniform(_Preset):
    """Glorot and Bengio (2010), uniform."""

    preset = (1.0, "fan_avg", "uniform")


class GlorotNormal(_Preset):
    """Glorot and Bengio (2010), normal."""

    preset = (1.0, "fan_avg", "truncated_normal")


class HeUniform(_Preset):
    """He et al. (2015), uniform."""

    preset = (2.0, "fan_in", "uniform")


class HeNormal(_Preset):
    """He et al. (2015), normal."""

    preset = (2.0, "fan_in", "truncated_normal")


class LecunUniform(_Preset):
    """LeCun et al. (1998), uniform."""

    preset = (1.0, "fan_in", "uniform")


class LecunNormal(_Preset):
    """LeCun et al. (1998), normal."""

    preset = (1.0, "fan_in", "truncated_normal")


@dataclass(frozen=True)
class _Called:
    function: Callable[..., Any]

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The function's value, which must have the shape."""
        given = plain_array(self.function(shape, dtype), f"the value of initializer {self.function!r}")
        value = np.array(given, dtype)
        if value.shape != shape:
            raise ValueError(f"Initializer {self.function!r}: expected shape {shape}, received {value.shape}.")
        return value


Initializer = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]

_INITIALIZERS: dict[str, Callable[..., Any]] = {
    cls.__name__: cls
    for cls in (
        Zeros,
        Ones,
        Constant,
        RandomNormal,
        TruncatedNormal,
        RandomUniform,
        VarianceScaling,
        GlorotUniform,
        GlorotNormal,
        HeUniform,
        HeNormal,
        LecunUniform,
        LecunNormal,
    )
}

_ALIASES = {"zero": "Zeros", "one": "Ones", "normal": "RandomNormal", "uniform": "RandomUniform"}


def get(value: Any) -> Initializer:
    """The initializer that a value names.

    Raises:
        ValueError: unknown, or None.
    """
    initializer = resolve(value, _INITIALIZERS, "initializer", call=_Called, aliases=_ALIASES)
    if initializer is None:
        raise ValueError("Expected an initializer, received None.")
    return cast("Initializer", initializer)
