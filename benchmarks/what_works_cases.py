"""The cases of `what_works`, and what is right in each: a float64 evaluation on the union of all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer import BatchNormalization

Array = NDArray[Any]
STEPS, MOMENTUM, EPSILON = 3, 0.9, 1e-3
CLOSE = 1e-5  # |got − want| / (1 + |want|), in float32


@dataclass(frozen=True)
class Case:
    """How the rows lie.

    Attributes:
        name: of a file.
        title: in a table.
        sizes: rows of each rank.
        masked: whether a third of the positions are masked, on each rank another number.
    """

    name: str
    title: str
    sizes: tuple[int, ...]
    masked: bool = False


CASES = {
    case.name: case
    for case in (
        Case("equal", "equal shards", (6, 6)),
        Case("uneven", "uneven shards", (7, 5)),
        Case("empty", "an empty shard", (12, 0)),
        Case("mask", "mask, equal shards", (6, 6), masked=True),
        Case("mask-uneven", "mask, uneven shards", (7, 5), masked=True),
    )
}


def data(case: Case, step: int) -> tuple[Array, Array, Array | None]:
    """x and dy of all ranks, (rows, 4, 3) in float32, and the mask, (rows, 4), where the case has one."""
    rng = np.random.default_rng([sum(case.sizes), step])
    shape = (sum(case.sizes), 4, 3)
    rows = np.arange(shape[0])[:, None, None]  # the ranks' data are unlike: later rows are larger
    x, dy = (rng.normal(0.3 * rows, 1 + 0.1 * rows, shape).astype(np.float32) for _ in range(2))
    mask = rng.random(shape[:2]) < np.where(rows[:, :, 0] < shape[0] // 2, 0.8, 0.5)
    return x, dy, mask if case.masked else None


def truth(case: Case, unbiased: bool) -> dict[str, Array]:
    """What every step gives on all rows, by the formula, in float64.

        y = (x − μ)·s        s = 1/√(v + ε)
        dx = s·(dy − m/N·(Σ dy + y·Σ dy·y))        m: 1 where the statistics see a position, 0 where it is masked

    Args:
        case: whose data.
        unbiased: whether the moving variance is that of N − 1, as torch's is.
    """
    seen: dict[str, Array] = {}
    mean, variance = np.zeros(3), np.ones(3)
    for step in range(STEPS):
        x, dy, mask = data(case, step)
        x, dy = x.astype(np.float64), dy.astype(np.float64)
        m = np.ones((*x.shape[:2], 1)) if mask is None else mask[..., None].astype(np.float64)
        n = m.sum()
        mu = (x * m).sum((0, 1)) / n
        v = ((x - mu) ** 2 * m).sum((0, 1)) / n
        s = 1 / np.sqrt(v + EPSILON)
        y = (x - mu) * s
        dx = s * (dy - m / n * (dy.sum((0, 1)) + y * (dy * y).sum((0, 1))))
        seen |= {f"y {step}": y, f"dx {step}": dx}
        mean = MOMENTUM * mean + (1 - MOMENTUM) * mu
        variance = MOMENTUM * variance + (1 - MOMENTUM) * v * (n / (n - 1) if unbiased else 1)
    return seen | {"moving mean": mean, "moving variance": variance}


def of_one_process(case: Case, unbiased: bool) -> dict[str, Array]:
    """What the layer itself, without a framework, gives in a process that has all rows."""
    layer = BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON)
    layer.unbiased = unbiased
    seen: dict[str, Array] = {}
    for step in range(STEPS):
        x, dy, mask = data(case, step)
        y, pullback = layer.vjp(x, training=True, mask=mask)
        seen |= {f"y {step}": y, f"dx {step}": pullback(dy)[0]}
    return seen | dict(zip(("moving mean", "moving variance"), layer.state.moving.values, strict=True))


def deviation(got: Array, want: Array) -> float:
    """The largest |got − want| / (1 + |want|); infinite where something is no number."""
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.max(np.abs(got - want) / (1 + np.abs(want)), initial=0.0))
