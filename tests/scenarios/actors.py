"""The ranks of a scenario: small but real. They compute limbs, walk through exchanges, and keep a mirror."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation
from bnlayer.exchange import BackwardExchange, ForwardExchange
from bnlayer.gradients import GradientSums
from bnlayer.kernels import reference
from bnlayer.moments import BatchStatistics
from bnlayer.moving import Rule
from bnlayer.state import LayerState
from bnserver.core.effects import Totals
from bnserver.core.events import Body, Join, Replacing
from support.forward_exchange import contribution

Exchange = Generator[tuple[Call, Body], Totals, str]
Options = dict[str, str]


@dataclass(slots=True)
class Rank:
    """One rank's end of its connection."""

    name: str
    rank: int
    connection: int
    join: Join
    generation: int = 0
    sequence: int = 0
    answered: int = 0
    layer_answered: int = 0
    last: tuple[Call, Body] | None = None
    before: tuple[Call, Body] | None = None
    pushes: int = 0
    frozen: bool = False
    deaf: bool = False
    layers: dict[str, Mirror] = field(default_factory=dict)
    exchange: Exchange | None = None
    contributions: int = 9
    versions: dict[str, int] = field(default_factory=dict)

    def hears(self, sequence: int) -> None:
        """An answer arrives."""
        self.answered, self.before = sequence, self.last
        if self.last is not None and self.last[0].key.layer is not None:
            self.layer_answered = sequence


@dataclass(slots=True)
class Mirror:
    """What a rank knows of a layer."""

    signature: LayerSignature
    state: LayerState
    steps: dict[Direction, int] = field(default_factory=lambda: dict.fromkeys(Direction, 0))
    calls: list[tuple[NDArray[np.float32], BatchStatistics]] = field(default_factory=list)
    set: bool = False

    def completed(self, call: Call, limbs: NDArray[np.int64]) -> tuple[Call, Body]:
        """A contribution as it is sent: the first one since the state was set brings it along."""
        if not self.set:
            return call, limbs
        self.set = False
        assert isinstance(call.signature, LayerSignature)
        signature = replace(call.signature, state=self.state.fingerprint)
        return call._replace(signature=signature), Replacing(limbs, self.state)


def forward(mirror: Mirror, options: Options) -> Exchange:
    """A training call, one contribution after the other."""
    x = numbers(options["x"])
    masked = "mask" in options
    mask = None
    if masked:
        mask = np.array([word == "1" for word in options["mask"].split(",")]).reshape(-1, 1, 1)
    exchange = ForwardExchange.begin(mirror.state.forward, mirror.signature.epsilon, masked)
    key = ExchangeKey(options["layer"], Direction.FORWARD, mirror.steps[Direction.FORWARD])
    signature = replace(mirror.signature, update_moving="update" not in options)
    operations = []
    while exchange.wants is not None:
        operations.append(str(exchange.wants))
        call, limbs = contribution(exchange, key, signature, x.reshape(*x.shape, 1), mask)
        total = yield mirror.completed(call, limbs)
        exchange = exchange.reduced(total.limbs)
    assert exchange.statistics is not None
    mirror.calls.append((x, exchange.statistics))
    mirror.steps[Direction.FORWARD] += 1
    rule = None if "update" in options else Rule(mirror.signature.momentum, mirror.signature.epsilon, masked=masked)
    mirror.state = mirror.state.after_forward(exchange.statistics, exchange.grid, rule)
    return f"after {', '.join(operations)}: {described(options['layer'], mirror.state)}"


def backward(mirror: Mirror, options: Options) -> Exchange:
    """The gradients of the latest training call, likewise; or with `of=` those of the call of a step."""
    dy, step = numbers(options["dy"]), int(options.get("of", len(mirror.calls) - 1))
    if not mirror.calls:
        # A rank that resumes without a training call; the owner refuses it, whatever it sends.
        limbs = np.zeros((2, mirror.signature.channels), np.int64)
        key = ExchangeKey(options["layer"], Direction.BACKWARD, 0)
        yield Call(Operation.PROBE, key, mirror.signature, forward_step=0), limbs
        return "nothing"
    x, statistics = mirror.calls[step]
    exchange, operations = BackwardExchange.begin(mirror.state.backward, statistics), []
    view, dy_view = x.reshape(*x.shape, 1), dy.reshape(*dy.shape, 1)
    while exchange.gradients is None:
        assert exchange.wants is not None
        operations.append(str(exchange.wants))
        pivot = statistics.pivot
        if exchange.wants is Operation.PROBE:
            limbs = exchange.beyond_reach(reference.gradient_probe(dy_view, view, pivot, exchange.call_grid))
        else:
            sums = reference.gradient_sums(dy_view, view, None, pivot, exchange.call_grid)
            limbs = GradientSums(sums, exchange.call_grid).of_call(statistics.nonfinite).limbs
        signature = replace(mirror.signature, grid=exchange.fingerprint)
        key = ExchangeKey(options["layer"], Direction.BACKWARD, mirror.steps[Direction.BACKWARD])
        total = yield mirror.completed(Call(exchange.wants, key, signature, exchange.attempt, step), limbs)
        exchange = exchange.reduced(total.limbs)
    mirror.steps[Direction.BACKWARD] += 1
    mirror.state = mirror.state.after_backward(exchange.grid)
    return f"after {', '.join(operations)}: dbeta {listed(exchange.gradients.beta)}"


def described(name: str, state: LayerState) -> str:
    """A layer's moving statistics, for people."""
    return f"{name} has mean {listed(state.moving.mean)}, variance {listed(state.moving.variance)}"


def numbers(text: str) -> NDArray[np.float32]:
    """Rows between semicolons, channels between commas."""
    return np.array([[float(word) for word in row.split(",")] for row in text.split(";")], np.float32)


def listed(values: NDArray[Any]) -> str:
    """Numbers as a list, short."""
    return str([float(f"{value:.9g}") for value in values.reshape(-1).tolist()])
