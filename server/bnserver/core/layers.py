"""The owner's state: the moving statistics and grids of a job's layers.

Laws:
1. A layer is updated exactly once per completed forward exchange, by the layer's own pure functions.
2. The owner follows each exchange as the ranks do: it computes which operation must come next, and refuses others.
3. Nothing is committed before the sums are accepted; what a generation left unfinished is dropped, what it
   completed is kept.
4. What all ranks set by hand is taken over with the exchange that carries it: once, and only when it completes.
5. A layer keeps its state before the latest training call, and what was reduced since: `records` writes both. Of
   training calls whose gradients are still to come it keeps nothing: see `BackwardExchange`.
6. That an exchange is complete is known at once; the update may wait until the ranks have their answer. This can't be
   observed: reading the state makes the pending update first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bnlayer.collective import Call, Direction, LayerSignature
from bnlayer.exchange import BackwardExchange, ForwardExchange
from bnlayer.moving import Rule
from bnlayer.state import LayerState
from bnserver.core.events import Limbs, Replacing
from bnserver.core.journal_records import Completed, LayerSnapshot, Pushed


class DisagreementError(Exception):
    """The ranks agree with each other, but not with the owner; the text says in what, and what to do."""


class _Layer:
    """One layer.

    Attributes:
        version: the owner's; that of the state, once a pending update is made.
        forward, backward: the exchange in progress.
        set: the state that all ranks have set, and from which the exchange in progress begins; None if it begins from
            the owner's.
        base: the state before the latest training call.
        since: the records since then.
        calls: training calls that the ranks have made in this generation.
    """

    def __init__(self, state: LayerState) -> None:
        self.version = state.version
        self.forward: ForwardExchange | None = None
        self.backward: BackwardExchange | None = None
        self.set: LayerState | None = None
        self.base = state
        self.since: list[Completed | Pushed] = []
        self.calls = 0
        self._state = state
        self._pending_update: tuple[ForwardExchange, Rule | None] | None = None

    @property
    def state(self) -> LayerState:
        """The authoritative state, with a pending update made."""
        self.apply_update()
        return self._state

    @property
    def begins_from(self) -> LayerState:
        """The state before the exchange in progress."""
        return self.set if self.set is not None else self.state

    def replace(self, state: LayerState) -> None:
        """Take another state."""
        self.apply_update()
        self._state, self.version = state, state.version

    def complete(self, exchange: ForwardExchange, rule: Rule | None) -> None:
        """An exchange is complete: its update is pending. Without a rule it updates nothing."""
        self.replace(self.begins_from)
        self._pending_update, self.version, self.set = (exchange, rule), self.version + (rule is not None), None

    def apply_update(self) -> None:
        """Make the pending update."""
        if self._pending_update is None:
            return
        (exchange, rule), self._pending_update = self._pending_update, None
        assert exchange.statistics is not None
        self._state = self._state.after_forward(exchange.statistics, exchange.grid, rule)


class Layers:
    """The layers of one job, by name."""

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    @property
    def states(self) -> dict[str, LayerState]:
        """Every layer's state."""
        return {name: layer.state for name, layer in self._layers.items()}

    @property
    def records(self) -> list[LayerSnapshot | Completed | Pushed]:
        """The records that restore these layers."""
        records: list[LayerSnapshot | Completed | Pushed] = []
        for name, layer in self._layers.items():
            records += [LayerSnapshot(name, layer.base), *layer.since]
        return records

    def keep(self, record: LayerSnapshot) -> None:
        """Restore a layer from a snapshot."""
        self._layers[record.layer] = _Layer(record.state)

    def forget_unfinished(self) -> None:
        """Drop exchanges that were cut short: a new generation's ranks don't continue them."""
        self._layers = {name: _Layer(layer.state) for name, layer in self._layers.items()}

    def apply_update(self, name: str) -> None:
        """Make the pending update of a layer's latest exchange."""
        layer = self._layers.get(name)
        if layer is not None:
            layer.apply_update()

    def pulled(self, name: str) -> LayerState | None:
        """The state of a layer; None if there is no such layer."""
        layer = self._layers.get(name)
        return layer.state if layer is not None else None

    def pushed(self, rank: int, number: int, name: str, state: LayerState) -> Pushed:
        """The record of a push, which replaces a layer's state or adds the layer; with the owner's new version.

        Raises:
            DisagreementError: the layer has other channels or dtypes.
        """
        layer = self._layers.get(name)
        if layer is not None:
            _check_kind(name, layer.state, state)
        version = layer.state.version if layer is not None else 0
        return Pushed(rank, number, name, replace(state, version=version + 1))

    def replace(self, record: Pushed) -> None:
        """Apply a push."""
        layer = self._layers.get(record.layer)
        if layer is None or not layer.since:
            self._layers[record.layer] = _Layer(record.state)
            return
        if isinstance(layer.since[-1], Pushed):
            layer.since.pop()  # replaced by this one, and not needed any more
        layer.since.append(record)
        layer.replace(record.state)

    def seeded(self, name: str, seeds: Mapping[int, LayerState], *, anew: bool) -> tuple[LayerState, bool]:
        """The state of a layer that all ranks enroll, and whether the owner had it; rank 0's seeds a new one.

        Args:
            name: the layer's.
            seeds: every rank's own state.
            anew: rank 0's replaces the one that the owner has.

        Raises:
            DisagreementError: a rank's state has other channels or dtypes than the owner's, or than rank 0's.
        """
        layer = self._layers.get(name)
        known = layer is not None and not anew
        state = layer.state if layer is not None and known else seeds[min(seeds)]
        for seed in seeds.values():
            _check_kind(name, state, seed)
        return state, known

    def enroll(self, record: Completed, state: LayerState, *, anew: bool) -> None:
        """Apply an enrolment."""
        name = record.call.key.layer or ""
        layer = self._layers.get(name)
        if layer is not None and not anew:
            return
        if layer is None or not layer.since or layer.state.kind != state.kind:
            self._layers[name] = _Layer(state)
            return
        layer.since.append(record)  # a backward pass may still come
        layer.replace(state)

    def reduced(self, sequence: int, call: Call, signature: LayerSignature, body: Limbs | Replacing) -> int:
        """Apply the reduced limbs, and the state that the ranks set before; returns the layer's version after them.

        Raises:
            DisagreementError: it is not the operation that must come next for this layer.
        """
        name = call.key.layer
        layer = self._layers.get(name) if name is not None else None
        if layer is None:
            raise DisagreementError(f"The owner knows no layer {name!r}: enroll it first, on every rank.")
        renorm = signature.renorm is not None
        if (signature.channels, signature.dtype, renorm) != _shape(layer.state):
            raise DisagreementError(
                f"{call.key}: the ranks have {signature.channels} channels in {signature.dtype} "
                f"{_with_renorm(renorm)}, the owner has {layer.state.kind}. Enroll the layer anew, on every rank."
            )
        if isinstance(body, Replacing):
            _check_kind(call.key.layer or "", layer.state, body.state)
            limbs, layer.set = body.limbs, body.state
        else:
            limbs = body
        if call.key.direction is Direction.BACKWARD:
            version = _backward(layer, call, signature, limbs)
        else:
            base, begins = layer.state, layer.forward is None
            version = _forward(layer, call, signature, limbs)
            if begins:
                layer.base, layer.since = base, []
        layer.since.append(Completed(sequence, call, body))
        return version


def _forward(layer: _Layer, call: Call, signature: LayerSignature, limbs: Limbs) -> int:
    exchange = layer.forward
    layer.backward = None  # an unfinished one is dropped: the layer's records begin here
    if exchange is None:
        exchange = ForwardExchange.begin(layer.begins_from.forward, signature.epsilon, signature.masked)
    elif (exchange.epsilon, exchange.masked) != (signature.epsilon, signature.masked):
        raise DisagreementError(f"{call.key}: epsilon or the mask changed in the middle of an exchange.")
    _check_next(exchange, layer.state.version, call, signature)
    exchange = exchange.reduced(limbs)
    if exchange.wants is not None:
        layer.forward = exchange
        return layer.version
    layer.forward, layer.calls = None, call.key.step + 1
    layer.complete(exchange, _rule(signature) if signature.update_moving else None)
    return layer.version


def _backward(layer: _Layer, call: Call, signature: LayerSignature, limbs: Limbs) -> int:
    if call.forward_step is None or call.forward_step >= layer.calls:
        raise DisagreementError(
            f"{call.key}: the owner saw no training call, since the ranks joined, to which these gradients belong. "
            "Call the layer in training mode first, on every rank."
        )
    exchange = layer.backward
    if exchange is None:
        exchange = BackwardExchange.begin(layer.begins_from.backward, None)
    _check_next(exchange, layer.state.version, call, signature)
    exchange = exchange.reduced(limbs)
    if exchange.wants is not None:
        layer.backward = exchange
        return layer.version
    layer.backward = None
    layer.replace(layer.begins_from.after_backward(exchange.grid))
    layer.set = None
    return layer.version


def _check_next(
    exchange: ForwardExchange | BackwardExchange, version: int, call: Call, signature: LayerSignature
) -> None:
    received = (call.operation, call.attempt, signature.grid)
    wanted = (exchange.wants, exchange.attempt, exchange.fingerprint)
    if received == wanted:
        return
    raise DisagreementError(
        f"{call.key}: the ranks sent {call.operation} (round {call.attempt}, grid {signature.grid:016x}), the owner "
        f"expected {exchange.wants} (round {exchange.attempt}, grid {exchange.fingerprint:016x}) at its version "
        f"{version}. The ranks agree with each other, but hold another state of the layer than its owner: call "
        "world.pull(layer) on every rank before training goes on."
    )


def _check_kind(name: str, owned: LayerState, other: LayerState) -> None:
    if owned.kind != other.kind:
        raise DisagreementError(
            f"Layer {name!r}: the owner has {owned.kind}, received {other.kind}. Every rank must build the same "
            "model, and the model that the job began with; a new model needs a new job name."
        )


def _shape(state: LayerState) -> tuple[int, str, bool]:
    return state.channels, state.forward.dtype, state.moving.stddev is not None


def _with_renorm(renorm: bool) -> str:
    return "with renorm" if renorm else "without renorm"


def _rule(signature: LayerSignature) -> Rule:
    renorm_momentum = signature.renorm.momentum if signature.renorm is not None else 0.0  # unused
    return Rule(
        signature.momentum,
        signature.epsilon,
        renorm_momentum,
        synchronized=True,
        masked=signature.masked,
        unbiased=signature.unbiased,
    )
