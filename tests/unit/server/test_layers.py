"""What an owner keeps of a layer: bounded, whatever the ranks do after a training call, and enough to recover from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization
from bnlayer.collective import Alone, Call, Direction, ExchangeKey, LayerSignature, Operation, Total
from bnlayer.state import LayerState
from bnserver.core.events import Replacing
from bnserver.core.journal_records import Completed, LayerSnapshot, Pushed
from bnserver.core.layers import Layers
from bnserver.journal_encoding import decode, encode

_SIGNATURE = LayerSignature(2, "float32", 0.9, 0.001)


class _Owner(Alone):
    """A job of one rank, whose owner sees what it sends, and is recovered from its records whenever it is told."""

    def __init__(self) -> None:
        self.layers = Layers()
        self.longest = 0
        self.latest = 0

    def enroll(self, call: Call, state: LayerState) -> LayerState:
        seeded, known = self.layers.seeded(call, {0: state})
        self._completed(call, seeded, known=known)
        return seeded

    def exchange(self, call: Call, limbs: np.ndarray[Any, Any], state: LayerState | None = None) -> Total:
        self._completed(call, limbs if state is None else Replacing(limbs, state))
        return Total(limbs, self.layers.states["a"].version)

    def _completed(self, call: Call, body: Any, *, known: bool = False) -> None:
        self.latest += 1
        self.layers.completed(Completed(self.latest, call, body, known))
        self.longest = max(self.longest, len(self.layers.records))

    def recover(self) -> None:
        """As after a kill: what was reduced last must be among the records."""
        records = [decode(encode(record)) for record in self.layers.records]
        assert max(record.sequence for record in records if isinstance(record, Completed)) == self.latest
        self.layers = Layers()
        for record in records:
            match record:
                case LayerSnapshot():
                    self.layers.keep(record)
                case Pushed():
                    self.layers.replace(record)
                case Completed():
                    self.layers.completed(record)


def _follow(owner: _Owner, *, recovers: bool) -> bytes:
    """Many gradients for one training call, with states set, pushed and enrolled between."""
    layer = BatchNormalization(synchronized=True, name="a", collective=owner)
    rows = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
    pullbacks = [layer.vjp(rows + number, training=True)[1] for number in range(30)]
    for number, pullback in enumerate(pullbacks):
        pullback(rows * 4.0**number)
        if number % 7 == 3:
            layer.moving_mean.assign(np.full(2, number, np.float32))
        if number % 11 == 5:
            owner.layers.replace(owner.layers.pushed(0, number, "a", layer.state))
            layer.follow(owner.layers.states["a"])
        if number % 13 == 7:
            layer.reseed()
        if recovers:
            owner.recover()
        if number % 3 == 0:
            assert owner.layers.states["a"].backward.fingerprint == layer.state.backward.fingerprint
    layer(rows, training=True)
    return b"".join(array.tobytes() for array in owner.layers.states["a"].arrays().values())


@pytest.mark.parametrize("recovers", [False, True])
def test_many_gradients_for_one_training_call_take_no_more_memory(recovers: bool) -> None:
    """2,000 of them were 2,000 records in memory, and in each snapshot; and what is kept still gives the same state."""
    owner, undisturbed = _Owner(), _Owner()
    assert _follow(owner, recovers=recovers) == _follow(undisturbed, recovers=False)
    assert owner.longest <= 10


def test_enrolling_again_and_again_takes_no_more_memory() -> None:
    """A rank may ask for it without end; each time the training call before it stays, and one enrolment."""
    owner = _Owner()
    layer = BatchNormalization(synchronized=True, name="a", collective=owner)
    layer(np.ones((2, 2), np.float32), training=True)
    anew = Call(Operation.ENROLL, ExchangeKey("a", None, 0), replace(_SIGNATURE, anew=True, channels=2))
    for _ in range(20):
        owner.enroll(anew, layer.state)
        owner.recover()
    assert owner.longest <= 5


def test_an_enrolment_ends_the_gradients_in_progress() -> None:
    """Their first round was dropped from the records: what is recovered must expect what the owner did."""
    owner = _Owner()
    layer = BatchNormalization(synchronized=True, name="a", collective=owner)
    rows = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
    _, pullback = layer.vjp(rows, training=True)
    signature = replace(_SIGNATURE, epsilon=layer.epsilon, momentum=layer.momentum)
    probe = Call(Operation.PROBE, ExchangeKey("a", Direction.BACKWARD, 0), signature, 0, 0)
    owner.exchange(probe, np.zeros((2, 2), np.int64))
    owner.enroll(Call(Operation.ENROLL, ExchangeKey("a", None, 0), replace(signature, anew=True)), layer.state)
    pullback(rows)
    owner.recover()
    assert owner.layers.states["a"].backward.fingerprint == layer.state.backward.fingerprint
