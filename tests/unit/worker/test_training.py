"""The training loop in a world of one: what a step is, when it stops, what it reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from bnlayer import constraints, regularizers
from bnlayer.collective import install, installed
from bnworker.train.calibration import calibrate
from bnworker.train.checkpoint import Checkpoint
from bnworker.train.data import Batch, DataError, Dataset, LastBatch, from_arrays, load
from bnworker.train.evaluation import evaluate
from bnworker.train.events import Epoch, Event, Step
from bnworker.train.loop import DivergedError, Replica, Saving, train
from bnworker.train.model import Perceptron
from bnworker.train.optimizer import SGD
from bnworker.train.settings import Settings
from bnworker.train.steps import step
from bnworker.transports.alone import AloneTransport
from bnworker.world import World


@pytest.fixture
def world() -> Iterator[World]:
    """A world of one, current for the length of a test."""
    alone = World(AloneTransport(), install=False)
    with installed(alone):
        yield alone


def rows(number: int = 21) -> tuple[np.ndarray, np.ndarray]:
    """Three separable classes."""
    rng = np.random.default_rng(5)
    y = np.arange(number) % 3
    return rng.standard_normal((number, 4)) + 3 * np.eye(3, 4)[y], y


def small(validation_split: float = 0.0) -> Dataset:
    """They as a data set, the first six to be tested by as well."""
    x, y = rows()
    return from_arrays("small", x, y, x[:6], y[:6], dtype="float64", validation_split=validation_split)


SMALL = Settings(epochs=3, batch_size=8, hidden=(5,), dtype="float64")


def test_it_learns_the_digits(world: World) -> None:
    """The main job's promise, with its default settings: 97 % of rows it has never seen."""
    outcome = train(Settings(), load("digits"), world)
    assert outcome.epochs[-1].test_accuracy >= 0.97
    assert (len(outcome.epochs), outcome.steps) == (20, 460)
    assert outcome.model.norms[0].state.version == 460


def test_what_is_reported(world: World) -> None:
    """Every step and every epoch, in order; the epoch's loss is the mean over its rows."""
    made: list[Event] = []
    outcome = train(SMALL, small(), world, watch=made.append)
    steps = [one for one in made if isinstance(one, Step)]
    epochs = [one for one in made if isinstance(one, Epoch)]
    assert [(one.number, one.epoch, one.rows) for one in steps[:4]] == [(1, 1, 7), (2, 1, 7), (3, 1, 7), (4, 2, 7)]
    assert tuple(epochs) == outcome.epochs
    assert [one.steps for one in epochs] == [3, 6, 9]
    assert epochs[0].loss == pytest.approx(sum(one.loss * one.rows for one in steps[:3]) / 21)
    assert epochs[0].accuracy == pytest.approx(sum(one.accuracy * one.rows for one in steps[:3]) / 21)
    assert epochs[-1].loss < epochs[0].loss
    assert all(one.validation_loss is None and len(one.waiting) == 1 for one in epochs)
    last = outcome.model.norms[0].state
    assert epochs[-1].layers[0].name == "bn_1"
    assert epochs[-1].layers[0].moving_mean.tobytes() == last.moving.mean.tobytes()
    assert epochs[0].layers[0].moving_mean.tobytes() != last.moving.mean.tobytes()


def test_steps_stop_it(world: World) -> None:
    """In the middle of an epoch, which is then evaluated as it is."""
    outcome = train(Settings(epochs=3, batch_size=8, hidden=(5,), dtype="float64", steps=4), small(), world)
    assert outcome.steps == 4
    assert [one.rows for one in outcome.epochs] == [21, 7]
    assert world.statistics.exchanges["bn_1", "forward", "sums"] >= 4  # type: ignore[index]  # equal strings


@pytest.mark.parametrize(("last_batch", "rows"), [("spread", [7, 7, 7]), ("keep", [8, 8, 5]), ("drop", [8, 8])])
def test_the_last_batch(world: World, last_batch: LastBatch, rows: list[int]) -> None:
    """What is asked for reaches the steps, and the epoch counts the rows that were taken."""
    made: list[Event] = []
    outcome = train(replace(SMALL, last_batch=last_batch), small(), world, watch=made.append)
    assert [one.rows for one in made if isinstance(one, Step)] == rows * 3
    assert [one.rows for one in outcome.epochs] == [sum(rows)] * 3


def test_one_reduction_a_step(world: World) -> None:
    """Gradients and loss travel together; the evaluation of each epoch is one more."""
    train(SMALL, small(), world)
    counted = {str(kind[2]): count for kind, count in world.statistics.exchanges.items() if kind[0] is None}
    assert counted == {"broadcast": 1, "allreduce": 9 + 3}


def test_divergence_raises_an_error(world: World) -> None:
    """A loss that is not finite ends the run, with advice."""
    with (
        np.errstate(all="ignore"),
        pytest.raises(DivergedError, match=r"^The loss of step 2 is (nan|inf): try a lower --learning-rate\.$"),
    ):
        train(replace(SMALL, learning_rate=1e300), small(), world)


def test_replicas_share_the_rows() -> None:
    """Unsynchronized replicas together take every row once, each step's included."""
    taken = []
    for index in range(3):
        with installed(None):
            alone = World(AloneTransport(), install=False)
            install(alone)
            outcome = train(SMALL, small(), alone, Replica(index, 3))
            taken.append(outcome.epochs[0].rows)
            del outcome
    assert taken == [3 + 3 + 3, 2 + 2 + 2, 2 + 2 + 2]


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
        step(model, SGD(weights, learning_rate=1.0, momentum=0.0), next(data.batches(21, 0, 1)), alone)
    return gamma.value


def test_evaluation_is_over_all_held_out_rows(world: World) -> None:
    """Test and validation rows, each by themselves; without validation rows there is no score."""
    data = small(validation_split=0.2)
    model = Perceptron(4, (5,), 3, dtype="float64", seed=0)
    scores = evaluate(model, data, world, waiting=2.5)
    for batches, accuracy in ((data.test(), scores.test_accuracy), (data.validation(), scores.validation_accuracy)):
        right = np.concatenate([model(batch.x).argmax(axis=1) == batch.y for batch in batches])
        assert accuracy == right.mean()
    assert scores.test_loss > 0
    assert scores.waiting == (2.5,)
    assert data.validation_rows == 4
    assert evaluate(model, small(), world).validation_loss is None


def test_a_row_that_cannot_be_read_ends_it(world: World) -> None:
    """In a step and in an evaluation; nothing is updated by a step that lacked rows."""
    problem = DataError("x.npz: row 3: a feature is nan")
    data, model = small(), Perceptron(4, (5,), 3, dtype="float64", seed=0)
    weights = [*model.dense_weights, *model.norm_weights]
    before = [weight.value.tobytes() for weight in weights]
    bad = Batch(np.empty((0, 4)), np.empty(0, np.int64), 8, problem)
    with pytest.raises(DataError, match=r"^x\.npz: row 3: a feature is nan$"):
        step(model, SGD(weights, learning_rate=1.0, momentum=0.0), bad, world)
    assert [weight.value.tobytes() for weight in weights] == before
    for split in ("test", "validation"):
        with pytest.raises(DataError, match="row 3"):
            evaluate(model, _Unreadable(data, bad, split), world)  # type: ignore[arg-type]  # it has what is needed


class _Unreadable:
    """A data set of which the rows of one split are bad."""

    def __init__(self, data: Dataset, bad: Batch, split: str) -> None:
        self.test_rows, self.validation_rows = data.test_rows, 0
        self._bad = {split: [bad]}

    def test(self) -> Iterator[Batch]:
        """A bad block, or none."""
        return iter(self._bad.get("test", []))

    def validation(self) -> Iterator[Batch]:
        """A bad block, or none."""
        return iter(self._bad.get("validation", []))


def test_data_of_another_world_is_refused(world: World) -> None:
    """It would train on a part of the rows."""
    other = replace(small(), rank=1, world_size=2)
    with pytest.raises(
        ValueError, match=r"loaded for rank 1 of 2, and this is rank 0 of 1: expected load\(\.\.\., world"
    ):
        train(SMALL, other, world)


def test_the_schedule_reaches_the_steps(world: World) -> None:
    """The rate that a step says is the one that it was made with: a rate of 0 changes no weight."""
    made: list[Event] = []
    settings = replace(SMALL, schedule="step", decay=0.0, decay_epochs=1, momentum=0.0, warmup_steps=2)
    outcome = train(settings, small(), world, watch=made.append)
    assert [one.learning_rate for one in made if isinstance(one, Step)] == [0.05, 0.1, 0.1, 0, 0, 0, 0, 0, 0]
    assert [one.learning_rate for one in outcome.epochs] == [0.1, 0, 0]
    with installed(None):
        alone = World(AloneTransport(), install=False)
        install(alone)
        other = train(replace(settings, epochs=1), small(), alone)
        for mine, its in zip(outcome.optimizer.weights, other.optimizer.weights, strict=True):
            assert mine.value.tobytes() == its.value.tobytes()


def test_the_options_of_the_layer_reach_it(world: World) -> None:
    """Momentum, epsilon, penalties and projections."""
    settings = replace(
        SMALL,
        bn_momentum=0.5,
        epsilon=0.25,
        gamma_regularizer="l2=0.125",
        beta_regularizer="l1_l2=0.5,0.25",
        gamma_constraint="non_neg",
        beta_constraint="max_norm=3",
    )
    norm = train(settings, small(), world).model.norms[0]
    assert (norm.momentum, norm.epsilon) == (0.5, 0.25)
    assert norm.gamma_regularizer == regularizers.L2(0.125)
    assert norm.beta_regularizer == regularizers.L1L2(0.5, 0.25)
    assert norm.gamma_constraint == constraints.NonNeg()
    assert norm.beta_constraint == constraints.MaxNorm(3.0)


def test_early_stop_keeps_the_best(world: World) -> None:
    """It ends after the patience is over, and the result is the model of the epoch with the lowest loss."""
    settings = replace(SMALL, epochs=40, validation_split=0.3, early_stop=2, learning_rate=1.0)
    outcome = train(settings, small(0.3), world)
    losses = [one.validation_loss for one in outcome.epochs]
    best = min(range(len(losses)), key=lambda index: losses[index] or 0.0)
    assert len(losses) == best + 3 < 40
    assert outcome.kept == best + 1
    assert set(outcome.updates.values()) == {outcome.epochs[best].steps}
    assert (outcome.test_loss, outcome.test_accuracy) == (
        outcome.epochs[best].test_loss,
        outcome.epochs[best].test_accuracy,
    )
    assert evaluate(outcome.model, small(0.3), world).validation_loss == losses[best]


def test_a_calibration_replaces_the_statistics_of_the_result(world: World) -> None:
    """Where the run stopped early those of its best epoch; everything else in the checkpoint stays."""
    saved: list[Checkpoint] = []
    settings = replace(SMALL, epochs=40, validation_split=0.3, early_stop=2, learning_rate=1.0)
    train(settings, small(0.3), world, saving=Saving(saved.append))
    before, after = saved[-1].tensors, calibrate(saved[-1], small(0.3), world, 8).checkpoint.tensors
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert {"best/bn_1/state/moving_mean", "best/bn_1/state/moving_variance"} <= changed
    assert all(name.startswith("best/bn_1/state/") for name in changed)
