"""Batch normalization as a textbook writes it, for one array module: NumPy evaluates it, JAX differentiates it.

Keras's conventions, in float64: the biased variance, a mask whose count has 1e-7 added, renorm's corrections as
constants. Data comes as (N, C): every axis but the channels' made one.

Shape suffixes: N values of a channel, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = Any  # of NumPy or of JAX
Wide = NDArray[np.float64]


def rows(axis: int, array: NDArray[Any]) -> Wide:
    """(N, C) in float64, with the channels from an axis."""
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]).astype(np.float64)


def mask_rows(axis: int, mask: NDArray[Any] | None, shape: tuple[int, ...]) -> Wide | None:
    """A mask as (N, C) zeros and ones: expanded on the last axis, whichever holds the channels."""
    return None if mask is None else rows(axis, np.broadcast_to(mask[..., None], shape))


def moments(xp: Any, x_NC: Array, m_NC: Array | None) -> tuple[Array, Array]:
    """Mean and biased variance of what the mask leaves, two-pass."""
    if m_NC is None:
        mean = x_NC.mean(0)
        return mean, ((x_NC - mean) ** 2).mean(0)
    divisor = m_NC.sum(0) + 1e-7
    mean = xp.where(m_NC > 0, x_NC, 0.0).sum(0) / divisor
    return mean, xp.where(m_NC > 0, (x_NC - mean) ** 2, 0.0).sum(0) / divisor


@dataclass(frozen=True)
class Weights:
    """A layer's vectors, float64; gamma 1 and beta 0 where it has none.

    Attributes:
        moving: by Keras's names.
    """

    gamma: Wide
    beta: Wide
    moving: dict[str, Wide]

    @classmethod
    def of(cls, names: list[str], values: list[NDArray[Any]]) -> Weights:
        """From `get_weights()`."""
        wide = {name: np.asarray(value).astype(np.float64) for name, value in zip(names, values, strict=True)}
        one = np.ones_like(wide["moving_mean"])
        gamma, beta = wide.pop("gamma", one), wide.pop("beta", 0 * one)
        return cls(gamma, beta, wide)


@dataclass(frozen=True)
class Settings:
    """The layer's numbers; renorm is None or the clipping."""

    momentum: float
    epsilon: float
    renorm_momentum: float = 0.99
    renorm: dict[str, float] | None = None


def correction(statistics: tuple[Wide, Wide], before: Weights, settings: Settings) -> tuple[Wide, Wide]:
    """r and d of renorm, clipped; 1 and 0 without it."""
    mean, variance = statistics
    if settings.renorm is None:
        return np.ones_like(mean), np.zeros_like(mean)
    slow = np.maximum(before.moving["renorm_stddev"], np.sqrt(settings.epsilon))
    r = np.sqrt(variance + settings.epsilon) / slow
    d = (mean - before.moving["renorm_mean"]) / slow
    limit = settings.renorm.get("dmax", np.inf)
    return np.clip(r, settings.renorm.get("rmin", 0), settings.renorm.get("rmax", np.inf)), np.clip(d, -limit, limit)


def normalized(
    xp: Any,
    x_NC: Array,
    gamma: Array,
    beta: Array,
    m_NC: Array | None,
    constants: tuple[Wide, Wide],
    epsilon: float,
) -> Array:
    """γ·(x̂·r + d) + β with the batch's own statistics; what is to be differentiated."""
    mean, variance = moments(xp, x_NC, m_NC)
    r, d = constants
    return gamma * ((x_NC - mean) / xp.sqrt(variance + epsilon) * r + d) + beta


def inferred(x_NC: Wide, weights: Weights, epsilon: float) -> Wide:
    """γ·(x − moving_mean)/√(moving_variance + ε) + β."""
    mean, variance = weights.moving["moving_mean"], weights.moving["moving_variance"]
    return weights.gamma * (x_NC - mean) / np.sqrt(variance + epsilon) + weights.beta


def moved(statistics: tuple[Wide, Wide], before: Weights, settings: Settings) -> dict[str, Wide]:
    """The moving statistics after a training call."""
    mean, variance = statistics
    old, stddev = before.moving, np.sqrt(variance + settings.epsilon)

    def towards(name: str, batch: Wide, momentum: float) -> Wide:
        return old[name] * momentum + batch * (1 - momentum)

    new = {"moving_mean": towards("moving_mean", mean, settings.momentum)}
    if settings.renorm is None:
        return {**new, "moving_variance": towards("moving_variance", variance, settings.momentum)}
    moving_stddev = towards("moving_stddev", stddev, settings.momentum)
    return {
        **new,
        "moving_variance": np.maximum(moving_stddev**2 - settings.epsilon, 0),
        "moving_stddev": moving_stddev,
        "renorm_mean": towards("renorm_mean", mean, settings.renorm_momentum),
        "renorm_stddev": towards("renorm_stddev", stddev, settings.renorm_momentum),
    }
