"""Batch normalization evaluated plainly in extended precision: what the layer's error is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Wide = NDArray[np.longdouble]


@dataclass(frozen=True)
class Truth:
    """Output, gradients and statistics of one training call on (N, C) data, gamma 1 and beta 0."""

    y: Wide
    dx: Wide
    gamma: Wide
    beta: Wide
    mean: Wide
    variance: Wide


def evaluate(x: NDArray[Any], dy: NDArray[Any], mask: NDArray[Any] | None = None, epsilon: float = 1e-3) -> Truth:
    """The textbook formulas, two-pass, about the first row, which large means don't disturb."""
    m = np.ones(x.shape, np.longdouble) if mask is None else np.broadcast_to(mask, x.shape).astype(np.longdouble)
    e = np.longdouble(0 if mask is None else 1e-7)
    shift = x[:1].astype(np.longdouble)
    d = x.astype(np.longdouble) - shift
    n = m.sum(0)
    divisor = n + e
    # The mean about the shift, μ − shift: with a mask Keras's e pulls the mean itself towards 0.
    center = (m * d).sum(0) / divisor - shift[0] * (e / divisor)
    centered = d - center
    variance = (m * centered**2).sum(0) / divisor
    s = 1 / np.sqrt(variance + np.longdouble(epsilon))
    g = dy.astype(np.longdouble)
    a, b = g.sum(0), (g * centered).sum(0)
    mean = shift[0] + center
    dx = s * (g - (m / divisor) * (a + s * s * b * (centered - mean * (e / divisor))))
    return Truth(centered * s, dx, s * b, a, mean, variance)


def error(got: NDArray[Any], want: Wide) -> float:
    """max |got − want| / (1 + |want|)."""
    return float(np.max(np.abs(got.astype(np.longdouble) - want) / (1 + np.abs(want)), initial=0))
