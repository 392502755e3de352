"""A layer's exchanges with the other ranks: what is said at the door, and what comes of it.

Laws of this room:
1. What is asked next is decided by `exchange.py`, alike on every rank; this room only carries it out.
2. A call's step counts the exchanges of its direction that were completed before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bnlayer import passes
from bnlayer.collective import (
    Call,
    Collective,
    Direction,
    LayerTerms,
    Operation,
    Place,
    Total,
    claim,
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
    local_words: NDArray[np.int64]
    grid: BackwardGrid


class Rounds:
    """The exchanges of one layer with one collective.

    Args:
        collective: the ranks.
        name: the layer's.
    """

    def __init__(self, collective: Collective, name: str) -> None:
        self.collective = collective
        self._name = name
        self._steps = {Direction.FORWARD: 0, Direction.BACKWARD: 0}
        self._told: dict[Direction, tuple[LayerTerms, LayerTerms]] = {}

    def enroll(self, layer: object, terms: LayerTerms, state: LayerState) -> LayerState:
        """Make the layer known to the collective; the owner's state, which rank 0's seeded.

        Raises:
            ValueError: another live layer holds the name.
        """
        claim(self.collective, self._name, layer)
        return self.collective.enroll(Call(Operation.ENROLL, Place(self._name, None, 0), terms), state)

    def forward(self, view: View, terms: LayerTerms, grid: Grid) -> ForwardResult:
        """Agree on the statistics of the union of all ranks' batches."""
        exchange = ForwardExchange.begin(grid, terms.epsilon, view.mask is not None)
        version = None
        while exchange.wants is not None:
            if exchange.wants is Operation.PROBE:
                words = passes.probe(view, exchange.grid)
            else:
                words = passes.moments(view, exchange.grid).words
            total = self._say(exchange, Direction.FORWARD, view, terms, words)
            version = total.version
            exchange = exchange.reduced(total.words)
        self._steps[Direction.FORWARD] += 1
        assert exchange.moments is not None
        assert exchange.statistics is not None
        return ForwardResult(exchange.moments, exchange.statistics, exchange.grid, version)

    def backward(
        self, dy: View, view: View, terms: LayerTerms, statistics: BatchStatistics, grid: BackwardGrid
    ) -> BackwardResult:
        """Agree on the gradient sums of the union of all ranks' batches."""
        exchange = BackwardExchange.begin(grid, statistics)
        pivot = statistics.pivot
        fits = not statistics.poisoned.any()
        while True:
            if exchange.wants is Operation.PROBE:
                words = passes.gradient_probe(dy, view, pivot, exchange.grid)
            else:
                words = passes.gradient_sums(dy, view, pivot, exchange.grid, fits=fits).words
            exchange = exchange.reduced(self._say(exchange, Direction.BACKWARD, view, terms, words).words)
            if exchange.gradients is not None:
                self._steps[Direction.BACKWARD] += 1
                return BackwardResult(exchange.gradients, words, exchange.grid)

    def _say(
        self,
        exchange: ForwardExchange | BackwardExchange,
        direction: Direction,
        view: View,
        terms: LayerTerms,
        words: NDArray[np.int64],
    ) -> Total:
        assert exchange.wants is not None
        told = self._all_told(direction, terms, view.mask is not None, exchange.fingerprint)
        place = Place(self._name, direction, self._steps[direction])
        return self.collective.exchange(Call(exchange.wants, place, told, exchange.attempt), words)

    def _all_told(self, direction: Direction, terms: LayerTerms, masked: bool, grid: int) -> LayerTerms:
        """The layer's terms, and what is new with this call; the same object as before where nothing is."""
        flush_to_zero = not _TINIEST * _ONE > 0
        before, told = self._told.get(direction, (None, None))
        if (
            told is None
            or before is not terms
            or (told.masked, told.grid, told.flush_to_zero) != (masked, grid, flush_to_zero)
        ):
            told = replace(terms, masked=masked, flush_to_zero=flush_to_zero, grid=grid)
            self._told[direction] = terms, told
        return told


def share(result: BackwardResult, statistics: BatchStatistics) -> Gradients:
    """The gradients of gamma and beta from this rank's rows alone; they add up to the total's."""
    return GradientSums(result.local_words, result.grid).judged(statistics)[0]()
