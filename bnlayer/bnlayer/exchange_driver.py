"""A layer's exchanges with the other ranks: what is said at the door, and what comes of it.

Laws of this room:
1. What is asked next is decided by `exchange.py`, alike on every rank; this room only carries it out.
2. A call's step counts the exchanges of its direction that were completed before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bnlayer import tiling
from bnlayer.collective import (
    Call,
    Collective,
    Direction,
    ExchangeKey,
    LayerSignature,
    Operation,
    Total,
    claim,
    release,
)
from bnlayer.exchange import BackwardExchange, ForwardExchange
from bnlayer.gradients import Gradients, GradientSums
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moments import BatchStatistics, Moments
from bnlayer.state import LayerState
from bnlayer.view import View

_TINIEST = np.float32(2.0**-149)  # the smallest subnormal: a process that flushes them to zero would differ
_ONE = np.float32(1)


@dataclass(frozen=True, eq=False)
class ForwardResult:
    """An accepted forward exchange.

    Attributes:
        moments: of the global batch.
        statistics: what follows from them.
        grid: the one in force from now on.
        version: the owner's, where the owner is elsewhere.
    """

    moments: Moments
    statistics: BatchStatistics
    grid: Grid
    version: int | None


@dataclass(frozen=True, eq=False)
class BackwardResult:
    """An accepted backward exchange.

    Attributes:
        total: from the sums over all ranks.
        local_words: this rank's share of them.
        grid: the one they are in units of.
    """

    total: Gradients
    local_limbs: NDArray[np.int64]
    grid: BackwardGrid


class ExchangeDriver:
    """The exchanges of one layer with one collective.

    Args:
        collective: the ranks.
        name: the layer's.
    """

    def __init__(self, collective: Collective, name: str) -> None:
        self.collective = collective
        self._name = name
        self._steps = {Direction.FORWARD: 0, Direction.BACKWARD: 0}
        self._signatures: dict[Direction, tuple[LayerSignature, LayerSignature]] = {}

    def enroll(self, layer: object, signature: LayerSignature, state: LayerState) -> LayerState:
        """Make the layer known to the collective; the owner's state, which rank 0's seeded.

        Raises:
            ValueError: another live layer holds the name.
        """
        fresh = claim(self.collective, self._name, layer)
        try:
            return self.collective.enroll(Call(Operation.ENROLL, ExchangeKey(self._name, None, 0), signature), state)
        except BaseException:
            if fresh:
                release(self.collective, self._name)
            raise

    def forward(self, view: View, signature: LayerSignature, grid: Grid) -> ForwardResult:
        """Agree on the statistics of the union of all ranks' batches."""
        exchange = ForwardExchange.begin(grid, signature.epsilon, view.mask is not None)
        version = None
        while exchange.wants is not None:
            if exchange.wants is Operation.PROBE:
                limbs = tiling.probe(view, exchange.grid)
            else:
                limbs = tiling.moments(view, exchange.grid).limbs
            total = self._exchange(exchange, Direction.FORWARD, view, signature, limbs)
            version = total.version
            exchange = exchange.reduced(total.limbs)
        self._steps[Direction.FORWARD] += 1
        assert exchange.moments is not None
        assert exchange.statistics is not None
        return ForwardResult(exchange.moments, exchange.statistics, exchange.grid, version)

    def backward(
        self, dy: View, view: View, signature: LayerSignature, statistics: BatchStatistics, grid: BackwardGrid
    ) -> BackwardResult:
        """Agree on the gradient sums of the union of all ranks' batches."""
        exchange = BackwardExchange.begin(grid, statistics)
        pivot = statistics.pivot
        fits = not statistics.nonfinite.any()
        while True:
            if exchange.wants is Operation.PROBE:
                limbs = tiling.gradient_probe(dy, view, pivot, exchange.grid)
            else:
                limbs = tiling.gradient_sums(dy, view, pivot, exchange.grid, fits=fits).limbs
            exchange = exchange.reduced(self._exchange(exchange, Direction.BACKWARD, view, signature, limbs).limbs)
            if exchange.gradients is not None:
                self._steps[Direction.BACKWARD] += 1
                return BackwardResult(exchange.gradients, limbs, exchange.grid)

    def _exchange(
        self,
        exchange: ForwardExchange | BackwardExchange,
        direction: Direction,
        view: View,
        signature: LayerSignature,
        limbs: NDArray[np.int64],
    ) -> Total:
        assert exchange.wants is not None
        full_signature = self._full_signature(direction, signature, view.mask is not None, exchange.fingerprint)
        key = ExchangeKey(self._name, direction, self._steps[direction])
        return self.collective.exchange(Call(exchange.wants, key, full_signature, exchange.attempt), limbs)

    def _full_signature(
        self, direction: Direction, signature: LayerSignature, masked: bool, grid: int
    ) -> LayerSignature:
        """The layer's terms, and what is new with this call; the same object as before where nothing is."""
        flush_to_zero = not _TINIEST * _ONE > 0
        before, full_signature = self._signatures.get(direction, (None, None))
        if (
            full_signature is None
            or before is not signature
            or (full_signature.masked, full_signature.grid, full_signature.flush_to_zero)
            != (masked, grid, flush_to_zero)
        ):
            full_signature = replace(signature, masked=masked, flush_to_zero=flush_to_zero, grid=grid)
            self._signatures[direction] = signature, full_signature
        return full_signature


def share(result: BackwardResult, statistics: BatchStatistics) -> Gradients:
    """The gradients of gamma and beta from this rank's rows alone; they add up to the total's."""
    return GradientSums(result.local_limbs, result.grid).check_window(statistics)[0]()
