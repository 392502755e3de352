"""Ranks that disagree, on every transport: the error that each of them gets, word for word.

In each case the last rank does something else than the others. Two ranks blame both; of three, the last is blamed.
Hosts and process ids are taken out of the texts here, and looked for on their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from bnlayer import CollectiveError, MismatchError, PeerLostError, StallError
from bnworker import World
from support.contract import disagreeing as ranks
from support.contract.registry import BODIES, Body

_SAME_MODEL = "All ranks must build the same model and make the same calls; "
_SAME_ORDER = (
    "Every rank must call the same layers in the same order, in the same mode; "
    "look for a skipped layer, or one in evaluation or frozen on some ranks."
)
_SAME_CALLS = "Every rank must make the same calls; look for an early return, a break, or a shard with fewer steps."


@dataclass(frozen=True)
class Disagreement:
    """One way to disagree.

    Attributes:
        act: what a rank does, given whether it is the one that differs.
        kind: the error.
        text: by the number of ranks, the error's text, without hosts and process ids.
        blames_all: whether of two ranks both are blamed.
        at: layer and step that the error holds on the ranks that don't differ.
        odd_at: those that it holds on the one that does, where they are others; it raises nothing if `odd_leaves`.
    """

    act: Callable[[World, bool], object]
    kind: type[CollectiveError]
    text: dict[int, str]
    blames_all: bool = True
    at: tuple[str | None, int] = (None, 0)
    odd_at: tuple[str | None, int] | None = None
    odd_leaves: bool = False

    def run(self, world: World) -> object:
        """What each rank does and sees; returns the text, which must be the same on every rank."""
        odd = world.rank == world.world_size - 1
        if odd and self.odd_leaves:
            self.act(world, odd)
            return None
        with pytest.raises(CollectiveError) as caught:
            self.act(world, odd)
        error = caught.value
        assert type(error) is self.kind
        blamed = (0, 1) if world.world_size == 2 and self.blames_all else (world.world_size - 1,)
        expected = self.odd_at if odd and self.odd_at is not None else self.at
        self.check_text(without_hosts(str(error)), world)
        assert str(error) != without_hosts(str(error)), "the text names hosts and process ids"
        assert (error.ranks, error.layer, error.step) == (blamed, *expected)
        for later in (world.barrier, lambda: world.allreduce([1.0]), lambda: world.broadcast([1.0])):
            with pytest.raises(self.kind) as repeated:
                later()
            assert repeated.value is not error
            assert (str(repeated.value), repeated.value.ranks) == (str(error), error.ranks)
        assert repr(world).endswith(f", ended by {self.kind.__name__})")
        world.leave()
        return None if self.odd_leaves else str(error)

    def check_text(self, text: str, world: World) -> None:
        """The text is the expected one; but a service tells of a failure at once, whoever waits by then."""
        who, _, waiting = self.text[world.world_size].partition(". ")
        if self.kind is PeerLostError and world.transport == "service":
            key = waiting.partition(" in ")[2]
            assert text.startswith(f"{who}. ")
            assert text.endswith((f" in {key}", ". nobody waited for it."))
        else:
            assert text == self.text[world.world_size]


def without_hosts(text: str) -> str:
    """A text without "(host n2, pid 4711)"."""
    return re.sub(r" \(host [^,()]+, pid \d+\)", "", text)


def stall(common: str, odd: str) -> dict[int, str]:
    """The text for ranks that wait in different places."""
    return {
        2: f"The ranks wait for each other: rank 0 waits in {common}; rank 1 waits in {odd}. {_SAME_ORDER}",
        3: f"The ranks wait for each other: rank 0, rank 1 wait in {common}; rank 2 waits in {odd}. {_SAME_ORDER}",
    }


def mismatch(key: str, *described: tuple[str, str, str]) -> dict[int, str]:
    """The text for ranks whose signatures differ: (what, common value, odd value) each."""
    two = "; ".join(f"{name}: rank 0 sent {common}, rank 1 sent {odd}" for name, common, odd in described)
    three = "; ".join(f"{name}: rank 2 sent {odd}, rank 0, rank 1 sent {common}" for name, common, odd in described)
    return {
        2: f"{key}: {two}. {_SAME_MODEL}compare their code.",
        3: f"{key}: {three}. {_SAME_MODEL}check the configuration of rank 2.",
    }


_SYNCHRONIZE = "give every rank rank 0's: world.synchronize([layer])"
_PUSH = "over a service, world.push(layer) on one rank, and then world.pull(layer) on the others"
_SET_ALIKE = ("Set them alike on every rank", _SYNCHRONIZE, _PUSH)
_SET_ON_ONE = (
    "moving statistics or grids were set on rank 1, but not on rank 0",
    "moving statistics or grids were set on rank 2, but not on rank 0, rank 1",
)
_OWN = "if each rank is to have its own gamma and beta: BatchNormalization(..., own_weights=True)"


def set_apart(two: str, three: str, *advice: str, key: str = "layer 'bn' (forward, step 1)") -> dict[int, str]:
    """The text for ranks that set statistics or weights by hand, but not alike."""
    ways = "; or ".join(advice)
    return {2: f"{key}: {two}. {ways}.", 3: f"{key}: {three}. {ways}."}


def left(key: str) -> dict[int, str]:
    """The text for ranks that wait for one that has left cleanly."""
    return {
        2: f"rank 1 left the job, while rank 0 waits in {key}. {_SAME_CALLS}",
        3: f"rank 2 left the job, while rank 0, rank 1 wait in {key}. {_SAME_CALLS}",
    }


def lost(reason: str, key: str) -> dict[int, str]:
    """The text for ranks that wait for one that has failed."""
    return {
        2: f"rank 1 {reason}. rank 0 waits in {key}.",
        3: f"rank 2 {reason}. rank 0, rank 1 wait in {key}.",
    }


ONE = "('float64[3]',)"

DISAGREEMENTS = {
    "layers": Disagreement(
        ranks.different_layers,
        StallError,
        stall("the enrolment of layer 'a'", "the enrolment of layer 'b'"),
        at=("a", 0),
        odd_at=("b", 0),
    ),
    "order": Disagreement(
        ranks.different_order,
        StallError,
        stall("layer 'a' (forward, step 1)", "layer 'b' (forward, step 1)"),
        at=("a", 1),
        odd_at=("b", 1),
    ),
    "direction": Disagreement(
        ranks.skipped_backward,
        StallError,
        stall("layer 'bn' (backward, step 0)", "layer 'bn' (forward, step 1)"),
        at=("bn", 0),
        odd_at=("bn", 1),
    ),
    "step": Disagreement(
        ranks.extra_step,
        StallError,
        stall("barrier (number 0)", "layer 'bn' (forward, step 1)"),
        odd_at=("bn", 1),
    ),
    "mode": Disagreement(
        ranks.evaluating,
        StallError,
        stall("layer 'a' (forward, step 1)", "layer 'b' (forward, step 1)"),
        at=("a", 1),
        odd_at=("b", 1),
    ),
    "frozen": Disagreement(
        ranks.frozen,
        StallError,
        stall("layer 'a' (forward, step 1)", "layer 'b' (forward, step 1)"),
        at=("a", 1),
        odd_at=("b", 1),
    ),
    "skipped-layer": Disagreement(
        ranks.skipped_layer,
        StallError,
        stall("layer 'b' (forward, step 1)", "layer 'c' (forward, step 1)"),
        at=("b", 1),
        odd_at=("c", 1),
    ),
    "extra-layer": Disagreement(
        ranks.extra_layer,
        StallError,
        stall("the enrolment of layer 'b'", "the enrolment of layer 'extra'"),
        at=("b", 0),
        odd_at=("extra", 0),
    ),
    "channels": Disagreement(
        lambda world, odd: ranks.train(ranks.layer(world), world, channels=3 if odd else 4),
        MismatchError,
        mismatch("the enrolment of layer 'bn'", ("channels", "4", "3")),
        at=("bn", 0),
    ),
    "dtype": Disagreement(
        lambda world, odd: ranks.train(ranks.layer(world, dtype="float64" if odd else "float32"), world),
        MismatchError,
        mismatch("the enrolment of layer 'bn'", *((name, "float32", "float64") for name in ("dtype", "policy"))),
        at=("bn", 0),
    ),
    "momentum": Disagreement(
        lambda world, odd: ranks.train(ranks.layer(world, momentum=0.9 if odd else 0.99), world),
        MismatchError,
        mismatch("the enrolment of layer 'bn'", ("momentum", "0.99", "0.9")),
        at=("bn", 0),
    ),
    "epsilon": Disagreement(
        lambda world, odd: ranks.train(ranks.layer(world, epsilon=1e-5 if odd else 1e-3), world),
        MismatchError,
        mismatch("the enrolment of layer 'bn'", ("epsilon", "0.001", "1e-05")),
        at=("bn", 0),
    ),
    "renorm": Disagreement(
        lambda world, odd: ranks.train(ranks.layer(world, renorm=odd), world),
        MismatchError,
        mismatch(
            "the enrolment of layer 'bn'",
            ("renorm", "None", "Renorm(momentum=0.99, rmax=None, rmin=None, dmax=None)"),
        ),
        at=("bn", 0),
    ),
    "masked": Disagreement(
        ranks.different_masks,
        MismatchError,
        mismatch("layer 'bn' (forward, step 1)", ("masked", "False", "True")),
        at=("bn", 1),
    ),
    "update": Disagreement(
        ranks.one_does_not_update,
        MismatchError,
        mismatch("layer 'bn' (forward, step 1)", ("update_moving", "True", "False")),
        at=("bn", 1),
    ),
    "set-on-one": Disagreement(
        ranks.set_on_one,
        MismatchError,
        set_apart(*_SET_ON_ONE, *_SET_ALIKE),
        blames_all=False,
        at=("bn", 1),
    ),
    "pulled-back-call": Disagreement(
        ranks.different_calls,
        MismatchError,
        mismatch("layer 'bn' (backward, step 0)", ("training call (forward step)", "0", "1")),
        at=("bn", 0),
    ),
    "set-differently": Disagreement(
        ranks.set_differently,
        MismatchError,
        set_apart(
            "moving statistics or grids were set differently on rank 0 and on rank 1",
            "moving statistics or grids were set differently on rank 2 and on rank 0, rank 1",
            *_SET_ALIKE,
        ),
        at=("bn", 1),
    ),
    "set-before-backward": Disagreement(
        ranks.set_before_backward,
        MismatchError,
        set_apart(*_SET_ON_ONE, *_SET_ALIKE, key="layer 'bn' (backward, step 0)"),
        blames_all=False,
        at=("bn", 0),
    ),
    "grid": Disagreement(
        ranks.one_restores,
        MismatchError,
        set_apart(*_SET_ON_ONE, *_SET_ALIKE),
        blames_all=False,
        at=("bn", 1),
    ),
    "weights-on-one": Disagreement(
        ranks.weights_on_one,
        MismatchError,
        set_apart(
            "moving statistics or grids were set on rank 1, but not on rank 0; "
            "gamma or beta were set on rank 1, but not on rank 0",
            "moving statistics or grids were set on rank 2, but not on rank 0, rank 1; "
            "gamma or beta were set on rank 2, but not on rank 0, rank 1",
            *_SET_ALIKE,
            _OWN,
        ),
        blames_all=False,
        at=("bn", 1),
    ),
    "other-weights": Disagreement(
        ranks.other_weights,
        MismatchError,
        set_apart(
            "gamma or beta differ between rank 0 and rank 1",
            "gamma or beta differ between rank 2 and rank 0, rank 1",
            *("Load the same ones on every rank", _SYNCHRONIZE, _OWN),
            key="the enrolment of layer 'bn'",
        ),
        at=("bn", 0),
    ),
    "own-weights": Disagreement(
        lambda world, odd: ranks.train(ranks.layer(world, own_weights=odd), world),
        MismatchError,
        mismatch("the enrolment of layer 'bn'", ("own_weights", "False", "True")),
        at=("bn", 0),
    ),
    "synchronized-layers": Disagreement(
        ranks.synchronize_others,
        MismatchError,
        mismatch(
            "synchronize (number 0)",
            (
                "layers",
                f"('{ranks.DESCRIBED.format('a')}', '{ranks.DESCRIBED.format('b')}')",
                f"('{ranks.DESCRIBED.format('a')}',)",
            ),
        ),
    ),
    "early-return": Disagreement(
        ranks.early_return,
        StallError,
        left("layer 'bn' (forward, step 1)"),
        blames_all=False,
        odd_leaves=True,
        at=("bn", 1),
    ),
    "failure": Disagreement(
        ranks.failure,
        PeerLostError,
        lost("failed with ValueError: no such file", "layer 'bn' (forward, step 1)"),
        blames_all=False,
        odd_leaves=True,
        at=("bn", 1),
    ),
    "failing-exit": Disagreement(
        ranks.failing_exit,
        PeerLostError,
        lost("failed with SystemExit: 3", "allreduce (number 0)"),
        blames_all=False,
        odd_leaves=True,
    ),
    "successful-exit": Disagreement(
        ranks.successful_exit, StallError, left("barrier (number 0)"), blames_all=False, odd_leaves=True
    ),
    "op": Disagreement(
        lambda world, odd: world.allreduce([np.zeros(3)], op="max" if odd else "sum"),
        MismatchError,
        mismatch("a plain operation (number 0)", ("op", "sum", "max")),
    ),
    "shape": Disagreement(
        lambda world, odd: world.allreduce([np.zeros(4 if odd else 3)]),
        MismatchError,
        mismatch("a plain operation (number 0)", ("arrays", ONE, "('float64[4]',)")),
    ),
    "array-dtype": Disagreement(
        lambda world, odd: world.allreduce([np.zeros(3, np.int64 if odd else np.float64)]),
        MismatchError,
        mismatch("a plain operation (number 0)", ("arrays", ONE, "('int64[3]',)")),
    ),
    "number-of-arrays": Disagreement(
        lambda world, odd: world.allreduce([np.zeros(3)] * (2 if odd else 1)),
        MismatchError,
        mismatch("a plain operation (number 0)", ("arrays", ONE, "('float64[3]', 'float64[3]')")),
    ),
    "root": Disagreement(
        lambda world, odd: world.broadcast([1.0], root=1 if odd else 0),
        MismatchError,
        mismatch("a plain operation (number 0)", ("root", "0", "1")),
    ),
}

for name, case in DISAGREEMENTS.items():
    BODIES[f"disagree_{name}"] = Body(case.run, (2, 3), ("mpi", "service"))


def _pushes(world: World) -> object:
    """Where each rank owns its own statistics, a push on one of them is found out."""
    odd = world.rank == world.world_size - 1
    with pytest.raises(MismatchError) as caught:
        ranks.push_on_one(world, odd)
    text = without_hosts(str(caught.value))
    sent = re.sub(r"\([0-9a-f]{8}\)", "(…)", text)
    expected = mismatch("layer 'bn' (forward, step 1)", ("pushed", "nothing", "1 (…)"))
    assert sent == expected[world.world_size]
    return str(caught.value)


BODIES["disagree_pushes"] = Body(_pushes, (2, 3), ("mpi",))
