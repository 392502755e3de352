"""The ranks of `test_any_history`, and what the owner's state must be after so many of their exchanges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.exchange import ForwardExchange
from bnlayer.moving import Rule
from bnlayer.state import LayerState
from bnserver.core.events import Replacing
from support.forward_exchange import bits, contribution, limbs_of, unprobed_state

__all__ = ["SIGNATURE", "Process", "bits", "next_of", "truth"]


SIGNATURE = LayerSignature(1, "float32", 0.9, 0.001)
X = [np.full((rows, 1, 1), value, np.float32) for rows, value in ((1, 0.5), (2, -3.0), (0, 0.0), (3, 7.25))]

Said = tuple[int, Call, object]


@dataclass(slots=True)
class Process:
    """A rank's process: what it knows, and has said.

    Attributes:
        connection: its connection; None while it has none.
        hears: whether what the service says arrives.
        alive: whether it gives signs of life.
    """

    rank: int
    incarnation: int
    connection: int | None
    hears: bool = True
    alive: bool = True
    generation: int = 0
    answered: int = 0
    layer_answered: int = 0
    asked: Said | None = None
    before: Said | None = None
    since: float = 0.0
    state: LayerState | None = None
    exchange: ForwardExchange | None = None
    steps: int = 0


@cache
def after(version: int) -> LayerState:
    """The owner's state after so many exchanges, as one rank with all rows would have it."""
    if version == 0:
        return unprobed_state(1)
    state = set_by_hand(after(version - 1))
    exchange = ForwardExchange.begin(state.forward, SIGNATURE.epsilon, False)
    while exchange.wants is not None:
        exchange = exchange.reduced(limbs_of(exchange, np.concatenate(X)))
    assert exchange.statistics is not None
    return state.after_forward(exchange.statistics, exchange.grid, Rule(SIGNATURE.momentum, SIGNATURE.epsilon))


def set_by_hand(state: LayerState) -> LayerState:
    """What the ranks make their next exchange from: now and then they set it before, with and without a grid."""
    moving = state.moving._replace(mean=state.moving.mean + np.float32(100))
    match state.version % 3:
        case 1:
            return replace(unprobed_state(1), moving=moving, version=state.version)
        case 2:
            return replace(state, moving=moving)
        case _:
            return state


def truth(version: int) -> bytes:
    """Its bits."""
    return bits(after(version))


def next_of(process: Process) -> tuple[Call, object]:
    """What a well-behaved rank says now."""
    if process.state is None:
        return Call(Operation.ENROLL, ExchangeKey("a", None, 0), SIGNATURE), unprobed_state(1)
    if process.exchange is None and process.answered % 2:
        return Call(Operation.BARRIER, ExchangeKey(None, None, process.answered), PlainSignature()), None
    begins, before = process.exchange is None, process.state
    if process.exchange is None:
        process.state = set_by_hand(before)
        process.exchange = ForwardExchange.begin(process.state.forward, SIGNATURE.epsilon, False)
    exchange = process.exchange
    replaces = begins and process.state is not before
    signature = replace(SIGNATURE, state=process.state.fingerprint) if replaces else SIGNATURE
    key = ExchangeKey("a", Direction.FORWARD, process.steps)
    call, limbs = contribution(exchange, key, signature, X[process.rank])
    return call, Replacing(limbs, process.state) if replaces else limbs
