"""The owner's state: the moving statistics and grids of a job's layers.

Laws:
1. A layer is updated exactly once per completed forward exchange, by the layer's own pure functions.
2. The owner follows each exchange as the ranks do: it computes which operation must come next, and refuses others.
3. Nothing is committed before the sums are accepted; what a generation left unfinished is dropped, what it
   completed is kept.
4. What all ranks set by hand is taken over with the exchange that carries it: once, and only when it completes.
5. A layer keeps its state before the latest training call, and what was reduced since: `records` writes both. Of
   training calls whose gradients are still to come it keeps nothing: see `BackwardExchange`.
6. What a layer keeps is bounded, however many backward exchanges, pushes and enrolments follow one training call: they
   are replaced by the state that came of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bnlayer.collective import Call, Direction, LayerSignature
from bnlayer.exchange import BackwardExchange, ForwardExchange
from bnlayer.moving import Rule
from bnlayer.state import LayerState
from bnserver.core.answers import Answer, DisagreementError
from bnserver.core.effects import Enrolled, Totals
from bnserver.core.events import Limbs, Replacing
from bnserver.core.journal_records import NOBODY, Completed, LayerSnapshot, Pushed


@dataclass(slots=True, eq=False)
class _Layer:
    """One layer.

    Attributes:
        state: the authoritative one.
        base: the state before the latest training call.
        since: the records since then.
        called: how many of them lead to the end of the training call; those that follow don't change what it is.
        forward, backward: the exchange in progress.
        set: the state that all ranks have set, and from which the exchange in progress begins; None if it begins from
            the owner's.
        calls: training calls that the ranks have made in this generation.
    """

    state: LayerState
    base: LayerState
    since: list[Completed | Pushed] = field(default_factory=list)
    called: int = 0
    forward: ForwardExchange | None = None
    backward: BackwardExchange | None = None
    set: LayerState | None = None
    calls: int = 0

    @classmethod
    def of(cls, state: LayerState) -> _Layer:
        """A layer that has nothing but a state."""
        return cls(state, state)

    @property
    def size(self) -> int:
        """Bytes of its state."""
        return size(self.state)


def size(state: LayerState) -> int:
    """Bytes of a layer's statistics and grids."""
    grids = (state.forward.pivot_C, state.forward.exponent_C, state.backward.gradient_C, state.backward.deviation_C)
    return sum(array.nbytes for array in (*state.moving.vectors.values(), *grids))


class Layers:
    """The layers of one job, by name.

    Attributes:
        size: bytes of their states.
    """

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}
        self.size = 0

    def __len__(self) -> int:
        """How many there are."""
        return len(self._layers)

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

    def size_with(self, name: str, state: LayerState) -> int:
        """Bytes of all states, once a layer has this one; no less than now."""
        layer = self._layers.get(name)
        return self.size + max(0, size(state) - (layer.size if layer is not None else 0))

    def keep(self, record: LayerSnapshot) -> None:
        """Restore a layer from a snapshot."""
        self._set(record.layer, record.state)

    def _set(self, name: str, state: LayerState) -> None:
        """A layer has nothing but this state."""
        before = self._layers.get(name)
        self.size += size(state) - (before.size if before is not None else 0)
        self._layers[name] = _Layer.of(state)

    def forget_unfinished(self) -> None:
        """Drop exchanges that were cut short: a new generation's ranks don't continue them."""
        self._layers = {name: _Layer.of(layer.state) for name, layer in self._layers.items()}

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
            self._set(record.layer, record.state)
            return
        if isinstance(layer.since[-1], Pushed):
            layer.since.pop()  # replaced by this one, and not needed any more
        layer.since.append(record)
        layer.state = record.state

    def seeded(self, call: Call, seeds: Mapping[int, LayerState]) -> tuple[LayerState, bool]:
        """The state of a layer that all ranks enroll, and whether the owner had it; rank 0's seeds a new one.

        Args:
            call: the enrolment; it may say that rank 0's state replaces the one that the owner has.
            seeds: every rank's own state.

        Raises:
            DisagreementError: a rank's state has other channels or dtypes than the owner's, or than rank 0's.
        """
        assert isinstance(call.signature, LayerSignature)
        name = call.key.layer or ""
        layer = self._layers.get(name)
        had = layer is not None and not call.signature.anew
        state = layer.state if layer is not None and had else seeds[min(seeds)]
        for seed in seeds.values():
            _check_kind(name, state, seed)
        return state, had

    def completed(self, record: Completed) -> Answer:
        """Apply the record of an operation on a layer that all ranks have completed; returns the answer.

        Raises:
            DisagreementError: it is not the operation that must come next for this layer.
        """
        call, body = record.call, record.body
        assert isinstance(call.signature, LayerSignature)
        if isinstance(body, LayerState):
            self._enroll(record, body, anew=call.signature.anew)
            return Answer(record.sequence, call, Enrolled((), record.sequence, body, record.known))
        version = self._reduced(record, call.signature, body)
        limbs = body.limbs if isinstance(body, Replacing) else body
        return Answer(record.sequence, call, Totals((), record.sequence, limbs, version))

    def _enroll(self, record: Completed, state: LayerState, *, anew: bool) -> None:
        name = record.call.key.layer or ""
        layer = self._layers.get(name)
        if layer is not None and not anew:
            return
        if layer is None or not layer.since or layer.state.kind != state.kind:
            self._set(name, state)
            return
        # A backward pass may still come. Of what else came since the training call nothing is left.
        layer.since[layer.called :] = [record]
        layer.state, layer.backward = state, None

    def _reduced(self, record: Completed, signature: LayerSignature, body: Limbs | Replacing) -> int:
        """Apply the reduced limbs, and the state that the ranks set before; returns the layer's version after them."""
        call = record.call
        name = call.key.layer
        layer = self._layers.get(name) if name is not None else None
        if layer is None:
            raise DisagreementError(f"The owner knows no layer {name!r}: enroll it first, on every rank.")
        before, renorm = layer.state, signature.renorm is not None
        owned = before.channels, before.forward.dtype, before.moving.stddev is not None
        if (signature.channels, signature.dtype, renorm) != owned:
            raise DisagreementError(
                f"{call.key}: the ranks have {signature.channels} channels in {signature.dtype} "
                f"{_with_renorm(renorm)}, the owner has {before.kind}. Enroll the layer anew, on every rank."
            )
        if isinstance(body, Replacing):
            _check_kind(call.key.layer or "", before, body.state)
            limbs, layer.set = body.limbs, body.state
        else:
            limbs = body
        if call.key.direction is Direction.BACKWARD:
            begins = layer.backward is None
            _backward(layer, call, signature, limbs)
            if begins and len(layer.since) > layer.called:
                # What came of the backward exchanges before this one: nobody asks for their answers any more.
                layer.since[layer.called :] = [Pushed(NOBODY, 0, name or "", before)]
            layer.since.append(record)
        else:
            begins = layer.forward is None
            _forward(layer, call, signature, limbs)
            if begins:
                layer.base, layer.since = before, []
            layer.since.append(record)
            layer.called = len(layer.since)
        return layer.state.version


def _forward(layer: _Layer, call: Call, signature: LayerSignature, limbs: Limbs) -> None:
    """Go on with a forward exchange; its last operation makes the moving update."""
    exchange, begins_from = layer.forward, layer.set or layer.state
    layer.backward = None  # an unfinished one is dropped: the layer's records begin here
    if exchange is None:
        exchange = ForwardExchange.begin(begins_from.forward, signature.epsilon, signature.masked)
    elif (exchange.epsilon, exchange.masked) != (signature.epsilon, signature.masked):
        raise DisagreementError(f"{call.key}: epsilon or the mask changed in the middle of an exchange.")
    _check_next(exchange, layer.state.version, call, signature)
    exchange = exchange.reduced(limbs)
    if exchange.wants is not None:
        layer.forward = exchange
        return
    assert exchange.statistics is not None
    rule = None
    if signature.update_moving:
        renorm_momentum = signature.renorm.momentum if signature.renorm is not None else 0.0  # unused
        rule = Rule(
            signature.momentum,
            signature.epsilon,
            renorm_momentum,
            synchronized=True,
            masked=signature.masked,
            unbiased=signature.unbiased,
        )
    layer.state = begins_from.after_forward(exchange.statistics, exchange.grid, rule)
    layer.forward, layer.set, layer.calls = None, None, call.key.step + 1


def _backward(layer: _Layer, call: Call, signature: LayerSignature, limbs: Limbs) -> None:
    if call.forward_step is None or call.forward_step >= layer.calls:
        raise DisagreementError(
            f"{call.key}: the owner saw no training call, since the ranks joined, to which these gradients belong. "
            "Call the layer in training mode first, on every rank."
        )
    exchange, begins_from = layer.backward, layer.set or layer.state
    if exchange is None:
        exchange = BackwardExchange.begin(begins_from.backward, None)
    _check_next(exchange, layer.state.version, call, signature)
    exchange = exchange.reduced(limbs)
    layer.backward = exchange
    if exchange.wants is None:
        layer.state, layer.backward, layer.set = begins_from.after_backward(exchange.grid), None, None


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


def _with_renorm(renorm: bool) -> str:
    return "with renorm" if renorm else "without renorm"
