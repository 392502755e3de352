"""Weights and statistics that are set by hand in mid-job: every transport gives what one process gives, bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import Alone, BatchNormalization, interchange
from bnlayer.collective import Collective
from bnworker import World
from support.contract.registry import as_text, body

_ROWS, _CHANNELS = 12, 3
_X = np.random.default_rng(0).normal(2, 3, (3, _ROWS, _CHANNELS)).astype(np.float32)
_X[1] *= 1e5  # another grid: what goes back to an earlier state goes back to its grid


class Trainer:
    """One rank's part of a program, or all of it.

    Attributes:
        bn: the layer.
        seen: outputs and gradients of these rows, in order.
    """

    def __init__(self, collective: Collective, rows: slice, **options: Any) -> None:
        self.seen: list[NDArray[Any]] = []
        self._rows = rows
        self._make: Callable[[], BatchNormalization] = lambda: BatchNormalization(
            synchronized=True, momentum=0.5, collective=collective, **options
        )
        self.begin_anew()

    def begin_anew(self) -> None:
        """Make a new layer of the same name in place of the old one."""
        self.bn: BatchNormalization = None  # type: ignore[assignment]  # the old one is gone first
        self.bn = self._make()
        self.bn.build((None, _CHANNELS))

    def call(self, step: int, *, training: bool = True) -> None:
        """One batch; `backward` is of the latest."""
        self.bn.forget_calls()
        self.seen.append(self.bn(_X[step][self._rows], training=training))

    def backward(self) -> None:
        """Its gradients."""
        self.seen.append(self.bn.backward(_X[0][self._rows]))


def _number(value: float) -> NDArray[np.float32]:
    return np.full(_CHANNELS, value, np.float32)


def _assigned(t: Trainer) -> None:
    t.call(0)
    t.bn.moving_mean.assign(_number(7))
    t.bn.non_trainable_weights[-1].assign(_number(0.25))
    t.call(1)


def _assigned_as_it_was(t: Trainer) -> None:
    t.call(0)
    t.bn.moving_mean.assign(t.bn.moving_mean)
    t.call(1)


def _weights(t: Trainer) -> None:
    t.call(0)
    weights = t.bn.get_weights()
    t.call(1)
    t.bn.set_weights([weights[0] + 1, *weights[1:]])
    t.call(2)
    t.backward()


def _restored(t: Trainer) -> None:
    t.call(0)
    state = t.bn.state
    t.call(1)
    t.call(2)
    t.bn.restore(state)  # with its grid and its version
    t.call(1)
    t.call(2)


def _loaded(t: Trainer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        t.call(0)
        interchange.save(Path(folder, "best.npz"), t.bn)
        t.call(1)
        interchange.load_into(Path(folder, "best.npz"), t.bn)
        t.call(2)


def _before_the_backward_pass(t: Trainer) -> None:
    t.call(0)
    t.backward()
    state = t.bn.state
    t.call(1)
    t.bn.restore(state)
    t.backward()
    t.call(2)


def _after_evaluation(t: Trainer) -> None:
    t.call(0)
    t.bn.moving_mean.assign(_number(7))
    t.call(1, training=False)
    t.bn.trainable = False
    t.call(1)
    t.bn.trainable = True
    t.call(2)


def _before_the_first_call(t: Trainer) -> None:
    t.bn.moving_mean.assign(_number(7))
    t.call(0)


def _settings(t: Trainer) -> None:
    t.call(0)
    t.bn.unbiased = True
    t.call(1)
    t.bn.momentum, t.bn.epsilon = 0.25, 0.125
    t.call(2)
    t.backward()
    t.bn.unbiased = False
    t.call(0)


def _in_a_new_layer(t: Trainer) -> None:
    t.call(0)
    weights = t.bn.get_weights()
    t.call(1)
    t.begin_anew()
    t.bn.set_weights(weights)
    t.call(2)
    t.backward()


_PROGRAMS = (
    _assigned,
    _assigned_as_it_was,
    _weights,
    _restored,
    _loaded,
    _before_the_backward_pass,
    _after_evaluation,
    _before_the_first_call,
    _settings,
    _in_a_new_layer,
)


def _contents(bn: BatchNormalization) -> list[list[str]]:
    return [as_text(array) for array in (*bn.get_weights(), *bn.state.arrays().values())]


@body()
def what_all_ranks_set_is_trained_on_as_by_one_process(world: World) -> object:
    """Outputs, gradients, weights, grids and versions; and the owner holds the same, where it is elsewhere."""
    saw = []
    rows = world.shard(_ROWS)
    for renorm in (False, True):
        for program in _PROGRAMS:
            options = {"name": f"{program.__name__} {renorm}", "renorm": renorm}
            mine, one = Trainer(world, rows, **options), Trainer(Alone(), slice(None), **options)
            program(mine)
            program(one)
            assert [y.tobytes() for y in mine.seen] == [y[rows].tobytes() for y in one.seen], options["name"]
            assert _contents(mine.bn) == _contents(one.bn), options["name"]
            owned = world.pull(mine.bn)
            assert (owned is not None) is (world.transport == "service")
            assert _contents(mine.bn) == _contents(one.bn), f"{options['name']}: its owner has something else"
            saw.append(_contents(mine.bn))
    return saw


@body(sizes=(2, 3), transports=("service",))
def what_one_sets_and_pushes_others_pull(world: World) -> object:
    """Neither has set anything by hand then: they train on from it, whatever the others had set before."""
    t = Trainer(world, world.shard(_ROWS), name="bn")
    t.call(0)
    t.bn.moving_mean.assign(_number(world.rank))
    if world.rank == 1:
        world.push(t.bn)
    world.barrier()
    world.pull(t.bn)
    one = Trainer(Alone(), slice(None), name="bn")
    one.call(0)
    one.bn.moving_mean.assign(_number(1))
    for each in (t, one):
        each.call(1)
    assert _contents(t.bn)[:4] == _contents(one.bn)[:4]
    assert t.bn.state.version == 3
    return _contents(t.bn)


@body(sizes=(2, 3), transports=("service",))
def what_all_set_beats_what_one_pushed_before(world: World) -> object:
    """The owner's state was newer than the others' mirrors: what they all set since is what counts."""
    t = Trainer(world, world.shard(_ROWS), name="bn")
    t.call(0)
    if world.rank == 1:
        world.push(t.bn)
    world.barrier()
    t.bn.moving_mean.assign(_number(7))
    t.call(1)
    one = Trainer(Alone(), slice(None), name="bn")
    one.call(0)
    one.bn.moving_mean.assign(_number(7))
    one.call(1)
    assert _contents(t.bn)[:4] == _contents(one.bn)[:4]
    world.barrier()
    mirror = _contents(t.bn)
    world.pull(t.bn)
    assert _contents(t.bn) == mirror
    return mirror


@body(sizes=(2, 3), transports=("service",))
def a_pull_discards_what_was_set(world: World) -> object:
    """It is how a rank says so."""
    t = Trainer(world, world.shard(_ROWS), name="bn")
    t.call(0)
    before = _contents(t.bn)
    if world.rank == 1:
        t.bn.moving_mean.assign(_number(7))
        world.pull(t.bn)
    assert _contents(t.bn) == before
    t.call(1)
    return _contents(t.bn)


@body()
def synchronize_gives_everyone_what_rank_0_has(world: World) -> object:
    """Weights, statistics, grids; of layers that were called, are new, or local; the owner's too, at once."""
    rows = world.shard(_ROWS)
    called, anew = Trainer(world, rows, name="called"), Trainer(world, rows, name="new")
    local = BatchNormalization(name="local")
    local(_X[world.rank], training=True)
    called.call(0)
    called.backward()
    called.call(1)
    if world.rank == 0:
        for trainer in (called, anew):
            trainer.bn.set_weights([np.arange(3) + n for n in range(4)])
    one = Trainer(Alone(), slice(None), name="called")
    one.call(0)
    one.backward()
    one.call(1)
    one.bn.set_weights([np.arange(3) + n for n in range(4)])
    world.synchronize([called.bn, anew.bn, local])
    assert _contents(called.bn) == _contents(one.bn)
    assert [w.tolist() for w in anew.bn.get_weights()] == [[n, n + 1, n + 2] for n in range(4)]
    for bn in (called.bn, anew.bn):
        before = _contents(bn)
        world.pull(bn)
        assert _contents(bn) == before
    for trainer in (called, one):
        trainer.backward()  # of the call before
        trainer.call(2)
    assert [y.tobytes() for y in called.seen] == [y[rows].tobytes() for y in one.seen]
    anew.call(2)
    assert _contents(called.bn) == _contents(one.bn)
    return [_contents(bn) for bn in (called.bn, anew.bn, local)]


@body()
def synchronize_refuses_what_it_can_not_give(world: World) -> object:
    """Before anything is sent: the world goes on."""
    bn = BatchNormalization(name="bn", synchronized=True, collective=world)
    foreign = BatchNormalization(name="foreign", synchronized=True, collective=Alone())
    foreign.build((None, 3))
    with pytest.raises(TypeError, match=r"expected a list, received BatchNormalization; write \[layer\]"):
        world.synchronize(bn)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(TypeError, match="expected BatchNormalization layers, received str too"):
        world.synchronize([bn, "x"])  # type: ignore[list-item]  # what is refused
    with pytest.raises(ValueError, match="Layer 'bn' has no state yet: call it once, or build"):
        world.synchronize([bn])
    with pytest.raises(ValueError, match="layer 'foreign' belongs to another world"):
        world.synchronize([foreign])
    bn.build((None, 3))
    with pytest.raises(ValueError, match="layer 'bn' is in the list twice"):
        world.synchronize([bn, bn])
    world.synchronize([bn])
    world.synchronize([])
    return _contents(bn)


@body(sizes=(2, 3))
def ranks_may_have_weights_of_their_own(world: World) -> object:
    """As in local SGD: own_weights=True compares no gamma and no beta, moving statistics stay everybody's."""
    bn = BatchNormalization(name="bn", synchronized=True, collective=world, own_weights=True)
    bn.build((None, 3))
    bn.set_weights([_number(world.rank), _number(-world.rank), _number(0), _number(1)])
    bn(_X[0], training=True)
    bn.set_weights([_number(world.rank + 1), *bn.get_weights()[1:]])
    bn(_X[0], training=True)
    assert [w.tolist() for w in bn.get_weights()[:2]] == [[world.rank + 1.0] * 3, [-float(world.rank)] * 3]
    assert "own_weights" not in bn.get_config()
    return _contents(bn)[2:]


@body()
def statistics_that_are_not_finite_are_refused_at_once(world: World) -> object:
    """On every transport, before anything is sent: no batch could ever mend them. Once they are finite, it goes on."""
    rows = world.shard(_ROWS)
    mine, one = Trainer(world, rows, name="bn"), Trainer(Alone(), slice(None), name="bn")
    for trainer in (mine, one):
        trainer.call(0)
    variance = mine.bn.moving_variance.numpy()
    mine.bn.moving_variance.assign([1, np.nan, np.inf])
    refused = (
        "^Layer 'bn': expected finite numbers in moving_variance, received nan in channel 1: in a synchronized layer "
        r"they would stay so\. Set finite ones, or reset them\.$"
    )
    for attempt in (mine.backward, lambda: mine.call(1), lambda: world.push(mine.bn)):
        with pytest.raises(ValueError, match=refused):
            attempt()
    mine.call(1, training=False)
    assert np.isnan(mine.seen.pop()[:, 1]).all()
    mine.bn.moving_variance.assign(variance)
    one.bn.moving_variance.assign(variance)
    for trainer in (mine, one):
        trainer.call(1)
        trainer.backward()
    assert [y.tobytes() for y in mine.seen] == [y[rows].tobytes() for y in one.seen]
    assert _contents(mine.bn) == _contents(one.bn)
    begun = Trainer(
        world, rows, name="begun", moving_mean_initializer=lambda shape, dtype: np.full(shape, np.inf, dtype)
    )
    with pytest.raises(
        ValueError, match=r"^Layer 'begun': expected finite numbers in moving_mean, received inf in chan"
    ):
        begun.call(0)
    world.barrier()
    return _contents(mine.bn)
