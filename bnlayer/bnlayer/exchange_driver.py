"""A layer's exchanges with the other ranks: builds each `Call`, sends it, and returns the accepted result.

`exchange.py` decides what is asked next, and does so alike on every rank; this module only carries it out. A call's
step counts the exchanges of its direction that were completed before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bnlayer.collective import (
    Alone,
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
from bnlayer.exchange import BackwardExchange, BackwardFinish, ForwardExchange, ForwardFinish
from bnlayer.gradients import Gradients, GradientSums
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels.results import BatchStatistics
from bnlayer.moments import Moments
from bnlayer.state import LayerState
from bnlayer.tiling import passes_of
from bnlayer.view import View

_TINIEST = np.float32(2.0**-149)  # the smallest subnormal: a process that flushes them to zero would differ
_ONE = np.float32(1)


@dataclass(frozen=True, eq=False)
class ForwardResult:
    """An accepted forward exchange.

    Attributes:
        moments: of the global batch.
        statistics: computed from them.
        grid: the one that the moments were accepted on.
        version: the owner's, where the owner is elsewhere.
        step: the exchange's number; its backward exchange sends it as `forward_step`.
    """

    moments: Moments
    statistics: BatchStatistics
    grid: Grid
    version: int | None
    step: int


@dataclass(frozen=True, eq=False)
class BackwardResult:
    """An accepted backward exchange.

    Attributes:
        total: from the sums over all ranks.
        local: this rank's share of them.
        grid: the one to keep.
    """

    total: Gradients
    local: GradientSums
    grid: BackwardGrid


@dataclass(frozen=True, eq=False)
class Changes:
    """What was set by hand since a layer's last exchange; it is sent with the first contribution of the next one.

    If all ranks set the same, they go on from it, and the owner takes the state over; otherwise they get a
    `MismatchError`.

    Attributes:
        state: the one that was set; None if none was.
        weights: fingerprint of gamma and beta, if they were set; 0 otherwise.
    """

    state: LayerState | None
    weights: int

    def announced(self, signature: LayerSignature) -> LayerSignature:
        """The signature with the fingerprints of what was set."""
        state = self.state.fingerprint if self.state is not None else 0
        return replace(signature, state=state, weights=self.weights)


class ExchangeDriver:
    """The exchanges of one layer with one collective.

    Args:
        collective: the ranks.
        name: the layer's.
    """

    def __init__(self, collective: Collective, name: str) -> None:
        self.collective = collective
        self.alone = type(collective) is Alone  # every exchange returns its own input
        self._name = name
        self._forward_steps = self._backward_steps = 0  # exchanges that were completed
        self._signatures: dict[tuple[Direction, bool], tuple[LayerSignature, LayerSignature]] = {}

    def enroll(
        self, layer: object, signature: LayerSignature, state: LayerState, weights: int, *, anew: bool = False
    ) -> LayerState:
        """Enroll the layer with the collective; returns the owner's state, which rank 0's seeded.

        Args:
            layer: the layer.
            signature: what must be equal on all ranks.
            state: this rank's.
            weights: fingerprint of gamma and beta; 0: not to be compared.
            anew: whether rank 0's state replaces the one that the owner has. It does where this name was enrolled
                before: that layer no longer exists, so the values of this one were made or loaded since.

        Raises:
            ValueError: another live layer holds the name.
        """
        claimed = claim(self.collective, self._name, layer)
        signature = replace(signature, weights=weights, anew=claimed.repeated or anew)
        try:
            return self.collective.enroll(Call(Operation.ENROLL, ExchangeKey(self._name, None, 0), signature), state)
        except BaseException:
            release(self.collective, self._name, claimed)
            raise

    def called_alone(self) -> int:
        """Count a forward exchange with nobody, which the kernels made by themselves; returns its step."""
        step = self._forward_steps
        self._forward_steps = step + 1
        return step

    def pulled_alone(self) -> None:
        """Count a backward exchange with nobody."""
        self._backward_steps += 1

    def forward(
        self,
        view: View,
        signature: LayerSignature,
        grid: Grid,
        changes: Changes | None = None,
        *,
        update_moving: bool = True,
        finish: ForwardFinish | None = None,
    ) -> ForwardResult:
        """Agree on the statistics of the union of all ranks' batches; `finish` as in `ForwardExchange.reduced`."""
        step = self._forward_steps
        exchange = ForwardExchange.begin(grid, signature.epsilon, view.mask is not None)
        version, passes = None, passes_of(view)
        while exchange.wants is not None:
            if exchange.wants is Operation.PROBE:
                limbs = passes.probe(view, exchange.grid)
            else:
                limbs = passes.moments(view, exchange.grid)
            key = ExchangeKey(self._name, Direction.FORWARD, step)
            full_signature = self._full_signature(key, view, signature, exchange.fingerprint, update_moving)
            total = self._exchange(Call(exchange.wants, key, full_signature, exchange.attempt), limbs, changes)
            version = total.version
            exchange = exchange.reduced(total.limbs, finish)
        self._forward_steps += 1
        assert exchange.moments is not None
        assert exchange.statistics is not None
        return ForwardResult(exchange.moments, exchange.statistics, exchange.grid, version, step)

    def backward(
        self,
        dy: View,
        view: View,
        signature: LayerSignature,
        statistics: BatchStatistics,
        forward_step: int,
        grid: BackwardGrid,
        changes: Changes | None = None,
        *,
        finish: BackwardFinish | None = None,
    ) -> BackwardResult:
        """Agree on the gradient sums of the union of all ranks' batches, for the training call of a step."""
        key = ExchangeKey(self._name, Direction.BACKWARD, self._backward_steps)
        exchange = BackwardExchange.begin(grid, statistics)
        pivot = statistics.pivot
        fits, passes = np.count_nonzero(statistics.nonfinite) == 0, passes_of(view)
        while True:
            assert exchange.wants is not None
            sums = None
            if exchange.wants is Operation.PROBE:
                limbs = exchange.beyond_reach(passes.gradient_probe(dy, view, pivot, exchange.call_grid))
            else:
                limbs = passes.gradient_sums(dy, view, pivot, exchange.call_grid, fits=fits)
                sums = GradientSums(limbs, exchange.call_grid)
                limbs = (sums if fits else sums.of_call(statistics.nonfinite)).limbs
            full_signature = self._full_signature(key, view, signature, exchange.fingerprint)
            call = Call(exchange.wants, key, full_signature, exchange.attempt, forward_step)
            exchange = exchange.reduced(self._exchange(call, limbs, changes).limbs, finish)
            if exchange.gradients is not None:
                assert sums is not None
                self._backward_steps += 1
                return BackwardResult(exchange.gradients, sums, exchange.grid)

    def _exchange(self, call: Call, limbs: NDArray[np.int64], changes: Changes | None) -> Total:
        """Exchange; the first contribution carries what was set since the layer's last exchange."""
        if changes is None or call.attempt:
            return self.collective.exchange(call, limbs)
        assert isinstance(call.signature, LayerSignature)
        call = call._replace(signature=changes.announced(call.signature))
        if changes.state is None:
            return self.collective.exchange(call, limbs)
        return self.collective.exchange(call, limbs, changes.state)

    def _full_signature(
        self, key: ExchangeKey, view: View, signature: LayerSignature, grid: int, update_moving: bool = True
    ) -> LayerSignature:
        """The layer's signature with the fields of this call; the same object as before where nothing differs."""
        flush_to_zero, masked = not _TINIEST * _ONE > 0, view.mask is not None
        assert key.direction is not None
        slot = key.direction, update_moving
        before, full_signature = self._signatures.get(slot, (None, None))
        if (
            full_signature is None
            or before is not signature
            or (full_signature.masked, full_signature.grid, full_signature.flush_to_zero)
            != (masked, grid, flush_to_zero)
        ):
            full_signature = replace(
                signature, masked=masked, flush_to_zero=flush_to_zero, grid=grid, update_moving=update_moving
            )
            self._signatures[slot] = signature, full_signature
        return full_signature


def share(result: BackwardResult, statistics: BatchStatistics) -> Gradients:
    """The gradients of gamma and beta from this rank's rows alone; they add up to the total's."""
    return result.local.check_window(statistics)[0]
