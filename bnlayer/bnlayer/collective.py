"""The interface between the layer and other ranks.

The layer asks its collective for exact integer totals and knows nothing else of the world. With each request it
sends a `Call`: its key (`ExchangeKey`), which names the exchange, and its signature, what all ranks must have in
common for it. Keys and signatures of all ranks must be equal; `agreement.py` finds those that differ.

Laws:
1. `exchange` returns the same limbs on every rank, whatever the order in which they were added.
2. A world of one is a collective like any other: `Alone`.
3. The process has one current collective, set by `bnworker.join()`; a layer's own `collective=` beats it.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from bnlayer.discovery import discovered
from bnlayer.environment import announced, batch_script, prte
from bnlayer.renorm import Renorm
from bnlayer.state import LayerState


class Operation(StrEnum):
    """What a rank asks for."""

    ENROLL = "enroll"
    PROBE = "probe"
    SUMS = "sums"
    REDUCE = "allreduce"
    BROADCAST = "broadcast"
    BARRIER = "barrier"


class Direction(StrEnum):
    """Which half of a training step an exchange belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"


class ExchangeKey(NamedTuple):
    """Names one exchange of a job.

    Attributes:
        layer: the layer's name; None for plain reductions, broadcasts and barriers.
        direction: None when a layer enrolls, and where layer is None.
        step: exchanges of this layer and direction (or plain operations) that came before, from 0.
    """

    layer: str | None
    direction: Direction | None
    step: int

    def __str__(self) -> str:
        if self.layer is None:
            return f"a plain operation (number {self.step})"
        if self.direction is None:
            return f"the enrolment of layer {self.layer!r}"
        return f"layer {self.layer!r} ({self.direction}, step {self.step})"


@dataclass(frozen=True, slots=True)
class LayerSignature:
    """What must be equal on all ranks for a layer's integers to be added.

    Attributes:
        channels: C.
        dtype: of the arithmetic, "float32" or "float64".
        momentum, epsilon: the layer's.
        masked: whether this call has a mask.
        renorm: how the layer renormalizes; None if it doesn't.
        unbiased: whether the moving variance is the unbiased one (torch's convention).
        flush_to_zero: whether this process rounds subnormal numbers to zero.
        grid: fingerprint of the grid whose units the limbs count; 0 for a probe or an enrolment.
        policy: the layer's dtype policy, e.g. "mixed_float16".
        update_moving: whether this call updates the moving statistics.
        own_weights: whether each rank has a gamma and a beta of its own.
        state: fingerprint of the moving statistics and grids, where they were set by hand since the last exchange.
        weights: fingerprint of gamma and beta, at an enrolment, and where they were set since the last exchange.
        anew: in an enrolment: whether rank 0's state replaces the one that the owner has.
    """

    channels: int
    dtype: str
    momentum: float
    epsilon: float
    masked: bool = False
    renorm: Renorm | None = None
    unbiased: bool = False
    flush_to_zero: bool = False
    grid: int = 0
    policy: str = "float32"
    update_moving: bool = True
    own_weights: bool = False
    state: int = 0
    weights: int = 0
    anew: bool = False


@dataclass(frozen=True, slots=True)
class PlainSignature:
    """What must be equal on all ranks for a plain operation.

    Attributes:
        op: "sum", "max" or "min"; "" for a broadcast or a barrier; "synchronize" for the broadcast that is part of it;
            "checkpoint" for the barrier after which the owner keeps its state.
        arrays: dtype and shape of each array, as text; empty for a broadcast, whose root alone knows them; to
            synchronize, each layer; of a checkpoint, its name and its training step.
        root: the broadcasting rank; -1 elsewhere.
    """

    op: str = ""
    arrays: tuple[str, ...] = ()
    root: int = -1


SYNCHRONIZE = "synchronize"
ADMIT = "admit"
CHECKPOINT = "checkpoint"


class Call(NamedTuple):
    """What one rank sends for an exchange, without the numbers.

    Attributes:
        operation: what it asks for.
        key: which exchange it is in.
        signature: what all ranks must agree on.
        attempt: the operation's number within one exchange: 0, 1 or 2 (sums; or probe, sums; or sums, probe, sums).
        forward_step: going backward, the step of the training call that is pulled back; None elsewhere.
    """

    operation: Operation
    key: ExchangeKey
    signature: LayerSignature | PlainSignature
    attempt: int = 0
    forward_step: int | None = None

    @property
    def where(self) -> str:
        """The key as text; a plain operation by its name."""
        if self.key.layer is not None:
            return str(self.key)
        operation = SYNCHRONIZE if self.synchronizes else self.operation
        return f"{operation} (number {self.key.step})"

    @property
    def synchronizes(self) -> bool:
        """Whether this is the broadcast of `World.synchronize`."""
        return isinstance(self.signature, PlainSignature) and self.signature.op == SYNCHRONIZE


class Total(NamedTuple):
    """What an exact exchange returns.

    Attributes:
        limbs: the reduced int64 limbs, of the shape that was sent.
        version: the owner's version after it, where the owner is elsewhere; None otherwise.
    """

    limbs: NDArray[np.int64]
    version: int | None = None


@runtime_checkable
class Collective(Protocol):
    """A set of ranks that exchange exact statistics. `Alone`, and every world of `bnworker`, is one."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    def enroll(self, call: Call, state: LayerState) -> LayerState:
        """Register a layer; every rank calls it once. Returns the owner's state, seeded by rank 0's."""

    def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
        """Reduce limbs exactly over the ranks: MAX for a probe, SUM for sums.

        `state` is given where `call.signature.state` is not 0: all ranks set it, and an owner elsewhere takes it over
        as part of this exchange.
        """

    def pull(self, layer: str) -> LayerState | None:
        """The owner's state of a layer; None where each rank owns its own (alone, MPI)."""


class Alone:
    """The world of one rank: every exchange returns its own input."""

    rank = 0
    world_size = 1
    transport = "alone"

    def enroll(self, call: Call, state: LayerState) -> LayerState:
        """Return the layer's own state: there is no other owner."""
        del call
        return state

    def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
        """Return the limbs: those of one rank are the total."""
        del call, state
        return Total(limbs)

    def pull(self, layer: str) -> LayerState | None:
        """Return None: there is no owner elsewhere."""
        del layer
        return None


_log = logging.getLogger("bnlayer")
_alone = Alone()
_current: Collective | None = None


def current() -> Collective:
    """The process's current collective, for a layer with `synchronized=True` and no `collective=`.

    The world that was joined; otherwise the one of a library that this process has initialized (`discovery.py`):
    torch's process group; otherwise a world of one.

    Raises:
        RuntimeError: no world was joined, but the environment announces more than one rank: training
            on would be silently unsynchronized.
    """
    if _current is not None:
        return _current
    world = discovered()
    if world is not None and world.world_size > 1:
        return world
    seen = next((a for a in announced(os.environ) if a.world_size > 1), None)
    started = prte(os.environ) if seen is None else f"{seen.source} announces {seen.world_size} ranks"
    if started is not None:
        which = f"{started} (this is rank {seen.rank})" if seen is not None else f"{started} started this process"
        raise RuntimeError(
            f"synchronized=True, but no world was joined, and {which}. Call bnworker.join() before the first training "
            "call; or set synchronized=False to train on local statistics."
        )
    if world is not None:
        return world
    _say_why_alone()
    return _alone


@cache
def _say_why_alone() -> None:
    """Log once that the environment looks as if there were more ranks."""
    if (why := batch_script(os.environ)) is not None:
        _log.warning("%s", why)


def is_current(collective: Collective) -> bool:
    """Whether a collective that `current` returned is what it would return now."""
    return collective is (_current or discovered() or _alone)


def install(collective: Collective | None) -> Collective | None:
    """Make a collective the process's current one; returns the one before. None: back to a world of one."""
    global _current
    before, _current = _current, collective
    return before


@contextmanager
def installed(collective: Collective | None) -> Iterator[None]:
    """Make a collective the current one for the length of a `with` block."""
    before = install(collective)
    try:
        yield
    finally:
        install(before)


_names: WeakKeyDictionary[Collective, WeakValueDictionary[str, object]] = WeakKeyDictionary()
_claimed: WeakKeyDictionary[Collective, set[str]] = WeakKeyDictionary()


class Claim(NamedTuple):
    """The result of `claim`.

    Attributes:
        repeated: whether a layer of this name, or this very layer, was enrolled with the collective before.
        fresh: whether no live layer held the name.
    """

    repeated: bool
    fresh: bool


def claim(collective: Collective, name: str, layer: object) -> Claim:
    """Take a layer's name within a collective, for as long as the layer lives.

    Returns:
        Whether this collective had a layer of the name before, alive or not; and whether the name was free.

    Raises:
        ValueError: another live layer of this process holds the name; their statistics would be mixed.
    """
    held = _names.setdefault(collective, WeakValueDictionary())
    if held.get(name, layer) is not layer:
        gc.collect()  # a layer in a reference cycle is unreachable, but not collected yet
    if held.get(name, layer) is not layer:
        raise ValueError(
            f"Two live synchronized layers are named {name!r}: layers are known by name within a job. "
            "Give each a name of its own: BatchNormalization(..., name=...)."
        )
    fresh = name not in held
    held[name] = layer
    claimed = _claimed.setdefault(collective, set())
    result = Claim(name in claimed, fresh)
    claimed.add(name)
    return result


def hand_over(collective: Collective, name: str, layer: object) -> None:
    """Let go of the name that a layer holds: another one takes its place, while something may still hold on to it."""
    held = _names.get(collective)
    if held is not None and held.get(name) is layer:
        del held[name]


def release(collective: Collective, name: str, claim: Claim) -> None:
    """Take a claim back, where the enrolment was refused."""
    if claim.fresh:
        _names[collective].pop(name, None)
    if not claim.repeated:
        _claimed[collective].discard(name)
