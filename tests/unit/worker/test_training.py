"""The training loop in a world of one: what a step is, when it stops, what it reports."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from bnlayer import regularizers
from bnlayer.collective import install, installed
from bnworker.data import Dataset, load
from bnworker.model import Perceptron
from bnworker.optimizer import SGD
from bnworker.training import DivergedError, Epoch, Replica, Settings, Step, _step, evaluate, train
from bnworker.transports.alone import AloneTransport
from bnworker.world import World


@pytest.fixture
def world() -> Iterator[World]:
    """A world of one, current for the length of a test."""
    alone = World(AloneTransport(), install=False)
    with installed(alone):
        yield alone


def small(rows: int = 21) -> Dataset:
    """Three separable classes."""
    rng = np.random.default_rng(5)
    y = np.arange(rows) % 3
    x = rng.standard_normal((rows, 4)) + 3 * np.eye(3, 4)[y]
    return Dataset("small", x, y, x[:6], y[:6], 3)


SMALL = Settings(epochs=3, batch_size=8, hidden=(5,), dtype="float64")


def test_it_learns_the_digits(world: World) -> None:
    """The main job's promise, with its default settings: 97 % of rows it has never seen."""
    outcome = train(Settings(), load("digits"), world)
    assert outcome.epochs[-1].test_accuracy >= 0.97
    assert (len(outcome.epochs), outcome.steps) == (20, 460)
    assert outcome.model.norms[0].state.version == 460


def test_what_is_reported(world: World) -> None:
    """Every step and every epoch, in order; the epoch's loss is the mean over its rows."""
    made: list[Step | Epoch] = []
    outcome = train(SMALL, small(), world, watch=made.append)
    steps = [one for one in made if isinstance(one, Step)]
    epochs = [one for one in made if isinstance(one, Epoch)]
    assert [(one.number, one.epoch, one.rows) for one in steps[:4]] == [(1, 1, 8), (2, 1, 8), (3, 1, 5), (4, 2, 8)]
    assert tuple(epochs) == outcome.epochs
    assert [one.steps for one in epochs] == [3, 6, 9]
    assert epochs[0].loss == pytest.approx(sum(one.loss * one.rows for one in steps[:3]) / 21)
    assert all(after.loss < before.loss for before, after in pairwise(epochs))


def test_steps_stop_it(world: World) -> None:
    """In the middle of an epoch, which is then judged as it is."""
    outcome = train(Settings(epochs=3, batch_size=8, hidden=(5,), dtype="float64", steps=4), small(), world)
    assert outcome.steps == 4
    assert [one.rows for one in outcome.epochs] == [21, 8]
    assert world.statistics.exchanges["bn_1", "forward", "sums"] >= 4  # type: ignore[index]  # equal strings


def test_one_reduction_a_step(world: World) -> None:
    """Gradients and loss travel together; the evaluation of each epoch is one more."""
    train(SMALL, small(), world)
    counted = {str(kind[2]): count for kind, count in world.statistics.exchanges.items() if kind[0] is None}
    assert counted == {"broadcast": 1, "allreduce": 9 + 3}


def test_it_says_when_it_diverges(world: World) -> None:
    """A loss that is not finite ends the run, with advice."""
    broken = small()
    broken.train_x[0, 0] = np.nan
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(DivergedError, match=r"The loss of step 1 is nan: try a lower --learning-rate\."),
    ):
        train(Settings(epochs=1, batch_size=21, hidden=(5,), dtype="float64"), broken, world)


def test_replicas_share_the_rows() -> None:
    """Unsynchronized replicas together take every row once, each step's included."""
    rows = []
    for index in range(3):
        with installed(None):
            alone = World(AloneTransport(), install=False)
            install(alone)
            outcome = train(SMALL, small(), alone, Replica(index, 3))
            rows.append(outcome.epochs[0].rows)
            del outcome
    assert rows == [3 + 3 + 2, 3 + 3 + 2, 2 + 2 + 1]


def test_regularizers_are_added_once(world: World) -> None:
    """The penalty's gradient reaches gamma's update on top of the loss's."""
    models = [Perceptron(4, (5,), 3, dtype="float64", seed=0)]
    data = small()
    plain = _updated(models.pop(), data, None)
    with_penalty = _updated(Perceptron(4, (5,), 3, dtype="float64", seed=0), data, regularizers.L2(0.5))
    assert with_penalty == pytest.approx(plain - 2 * 0.5 * np.ones(5), abs=1e-12)


def _updated(model: Perceptron, data: Dataset, regularizer: regularizers.L2 | None) -> np.ndarray:
    gamma = model.norms[0].gamma
    assert gamma is not None
    gamma.regularizer = regularizer
    alone = World(AloneTransport(), install=False)
    with installed(alone):
        weights = [*model.dense_weights, *model.norm_weights]
        _step(model, SGD(weights, learning_rate=1.0, momentum=0.0), data, np.arange(21), alone)
    return gamma.value


def test_evaluation_is_over_all_test_rows(world: World) -> None:
    """Whatever is evaluated at once."""
    data = small()
    model = Perceptron(4, (5,), 3, dtype="float64", seed=0)
    loss, accuracy = evaluate(model, data, world)
    right = model(data.test_x).argmax(axis=1) == data.test_y
    assert accuracy == right.mean()
    assert loss > 0
