"""Re-estimation of the moving statistics: exact population statistics in one pass.

Moving averages lag behind the weights and weigh batches unequally. Calibration runs the model over data once more,
in training mode and with fixed weights, and puts in their place the mean and variance of everything each layer saw:

    μ = Σx / N        v = Σ(x − μ)² / N        over all batches of the pass, all ranks, all unmasked values

The sums are the integers of the layers' own exchanges, pooled as fractions and rounded once at the end: neither the
number of ranks nor the way a batch is divided among them changes a bit.

Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), who call it precise BN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bnlayer.layer import BatchNormalization
from bnlayer.moments import Moments

if TYPE_CHECKING:
    from fractions import Fraction


class Population:
    """The pooled moments of many batches, whatever grids they were counted on."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, Fraction, Fraction]] = []
        self.nonfinite: NDArray[np.bool_] | None = None

    def add(self, moments: Moments) -> None:
        """Pool one more global batch."""
        sums = moments.exact()
        bad = moments.not_finite_C | moments.out_of_range_C
        if self.nonfinite is None:
            self._sums, self.nonfinite = sums, bad
            return
        self._sums = [(n + m, s + z, q + r) for (n, s, q), (m, z, r) in zip(self._sums, sums, strict=True)]
        self.nonfinite = self.nonfinite | bad

    @property
    def counts(self) -> list[int]:
        """N of each channel."""
        return [n for n, _, _ in self._sums]

    def mean_variance(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """μ and v of each channel, rounded once; 0 without a value."""
        mean, variance = [], []
        for n, s, q in self._sums:
            center = s / n if n else s
            mean.append(float(center))
            variance.append(max(0.0, float(q / n - center * center)) if n else 0.0)
        return np.array(mean), np.array(variance)


@contextmanager
def calibrating(layers: Iterable[BatchNormalization]) -> Iterator[None]:
    """Replace the layers' moving statistics by those of everything they see inside the `with` block.

        with calibrating(model.layers):
            for x in batches:
                model(x, training=True)

    Call the model in training mode, the same number of times on every rank (a rank that has run out of data gives
    empty batches). Weights stay as they are. If the block raises, the moving statistics are those from before.
    The calls inside leave nothing for `backward`. Where a service owns the statistics, it takes the result over with
    the layer's next training call; if none follows, one rank calls `world.push(layer)`.

    Args:
        layers: built or not yet built.

    Raises:
        ValueError: at the end: a layer saw no value, or one that is not finite, in some channel.
    """
    chosen = list(layers)
    before = [layer.state if layer.built else None for layer in chosen]
    populations = [Population() for _ in chosen]
    for layer, population in zip(chosen, populations, strict=True):
        layer.observe(population.add)
    try:
        yield
        results = [_checked(layer, population) for layer, population in zip(chosen, populations, strict=True)]
    except BaseException:
        for layer, state in zip(chosen, before, strict=True):
            if state is not None:
                layer.restore(replace(layer.state, moving=state.moving))
        raise
    finally:
        for layer in chosen:
            layer.observe(None)
            layer.forget_calls()
    for layer, (mean, variance) in zip(chosen, results, strict=True):
        _assign(layer, mean, variance)


def _checked(layer: BatchNormalization, population: Population) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if population.nonfinite is None:
        raise ValueError(
            f"Layer {layer.name!r} saw no batch while calibrating: call the model with training=True, unfrozen."
        )
    empty = [channel for channel, n in enumerate(population.counts) if n == 0]
    if empty:
        raise ValueError(f"Layer {layer.name!r} saw no value in channels {_some(empty)} while calibrating.")
    bad = np.flatnonzero(population.nonfinite).tolist()
    if bad:
        raise ValueError(f"Layer {layer.name!r} saw values that are not finite in channels {_some(bad)}.")
    return population.mean_variance()


def _some(channels: list[int]) -> str:
    shown = ", ".join(str(channel) for channel in channels[:8])
    return shown + (f", … ({len(channels)} in all)" if len(channels) > 8 else "")


def _assign(layer: BatchNormalization, mean: NDArray[np.float64], variance: NDArray[np.float64]) -> None:
    state = layer.state
    old = state.moving
    moving = old._replace(
        mean=mean.astype(old.mean.dtype),
        variance=variance.astype(old.variance.dtype),
        stddev=None if old.stddev is None else np.sqrt(variance + layer.epsilon).astype(old.stddev.dtype),
    )
    layer.restore(replace(state, moving=moving))
