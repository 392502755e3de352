"""Families of data that break sums: large means, heavy tails, jumps of scale, constants, extremes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Draw = Callable[[np.random.Generator, int, tuple[int, ...]], NDArray[Any]]


def _jump(rng: np.random.Generator, step: int, shape: tuple[int, ...]) -> NDArray[Any]:
    return rng.standard_normal(shape) * (1.0, 1e6, 1.0, 1e-6, 1.0)[step % 5]


def _outlier(rng: np.random.Generator, step: int, shape: tuple[int, ...]) -> NDArray[Any]:
    x = rng.standard_normal(shape)
    x[step % shape[0]] = 1e7
    return x


FAMILIES: dict[str, Draw] = {
    "normal": lambda rng, _, shape: rng.standard_normal(shape),
    "mean-1e4": lambda rng, step, shape: rng.standard_normal(shape) + 1e4 * (1 + 0.1 * step),
    "lognormal-3": lambda rng, _, shape: np.exp(3 * rng.standard_normal(shape)),
    "cauchy": lambda rng, _, shape: rng.standard_cauchy(shape),
    "constant": lambda _, step, shape: np.full(shape, 3.25 + step),
    "outlier": _outlier,
    "1e-30": lambda rng, _, shape: rng.standard_normal(shape) * 1e-30,
    "1e15": lambda rng, _, shape: rng.standard_normal(shape) * 1e15,
    "jump": _jump,
    "sparse": lambda rng, _, shape: (rng.random(shape) < 0.02) * rng.standard_normal(shape) * 10,
    "signed-zeros": lambda rng, _, shape: np.where(rng.random(shape) < 0.5, 0.0, -0.0),
}


def draw(family: str, seed: int, step: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """One batch of a family: a function of its arguments alone."""
    return FAMILIES[family](np.random.default_rng([seed, step]), step, shape).astype(dtype)
