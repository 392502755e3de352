"""The main job: data-parallel training whose result does not depend on the number of ranks.

Laws of this room:
1. A step's rows are given (`data.py`); each rank takes its share of them, none is padded or dropped, and a
   rank may get none.
2. The loss is the sum over all rows of the step, divided by their number: each rank divides its own sum by the
   number of ALL rows, and the gradients add up.
3. One reduction a step carries the Dense gradients and the loss. Gamma's and beta's gradients are those of
   all ranks already; regularizers are added once, after the reduction.
4. What is evaluated is the owner's moving statistics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnworker.data import Dataset, epoch_batches, steps_per_epoch
from bnworker.model import Perceptron, cross_entropy
from bnworker.optimizer import SGD
from bnworker.world import World

# Rows evaluated at once: bounds the memory, and is far above what fills a matrix multiplication.
_EVALUATED_AT_ONCE = 4096


class DivergedError(Exception):
    """The loss is not finite any more."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What determines a training run, besides the data.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows of a step, of all ranks together.
        learning_rate, momentum: of the optimizer.
        hidden: outputs of each hidden layer.
        seed: of the initial weights and the order of the rows.
        dtype: "float32" or "float64".
        steps: stop after so many steps, if that is sooner.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    hidden: tuple[int, ...] = (128, 64)
    seed: int = 0
    dtype: str = "float32"
    steps: int | None = None

    def total_steps(self, rows: int) -> int:
        """How many steps the run takes."""
        planned = self.epochs * steps_per_epoch(rows, self.batch_size)
        return planned if self.steps is None else min(planned, self.steps)


@dataclass(frozen=True, slots=True)
class Replica:
    """Which part of every step's rows belongs to this world; all of them, but for unsynchronized replicas.

    Attributes:
        index: this world's number.
        count: how many worlds train side by side, without exchange.
    """

    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """A step was made.

    Attributes:
        number: of the step, from 1.
        epoch: from 1.
        loss: mean over the step's rows, of all ranks.
        rows: of the step, of all ranks.
    """

    number: int
    epoch: int
    loss: float
    rows: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch is over, or the last step was made within it.

    Attributes:
        number: from 1.
        steps: made so far.
        loss: mean over the epoch's rows, while training.
        test_loss, test_accuracy: over the test rows, with the moving statistics.
        rows: trained on in this epoch, of all ranks.
        seconds: spent in this epoch's training steps.
    """

    number: int
    steps: int
    loss: float
    test_loss: float
    test_accuracy: float
    rows: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run leaves.

    Attributes:
        model: trained; its layers hold the owner's moving statistics.
        optimizer: with its velocities.
        epochs: one entry each.
    """

    model: Perceptron
    optimizer: SGD
    epochs: tuple[Epoch, ...]

    @property
    def steps(self) -> int:
        """How many steps were made."""
        return self.epochs[-1].steps

    @property
    def seconds(self) -> float:
        """Spent in training steps alone."""
        return math.fsum(epoch.seconds for epoch in self.epochs)


def train(
    settings: Settings,
    data: Dataset,
    world: World,
    replica: Replica = Replica(),
    watch: Callable[[Step | Epoch], None] = lambda _: None,
) -> Outcome:
    """Train; every rank of the world calls it with the same arguments.

    Args:
        settings: of the run.
        data: the whole data set, on every rank.
        world: the ranks that train together.
        replica: this world's part of the rows.
        watch: is told of every step and epoch.

    Raises:
        DivergedError: on every rank, when the loss is not finite any more.
        CollectiveError: another rank is lost, or disagrees.
    """
    model = Perceptron(data.features, settings.hidden, data.classes, dtype=settings.dtype, seed=settings.seed)
    weights = [*model.dense_weights, *model.norm_weights]
    # The same already, by the seed; but a rank with another NumPy might draw other numbers.
    for weight, value in zip(weights, world.broadcast([weight.value for weight in weights]), strict=True):
        weight.assign(value)
    optimizer = SGD(weights, learning_rate=settings.learning_rate, momentum=settings.momentum)
    epochs: list[Epoch] = []
    made, last = 0, settings.total_steps(data.rows)
    while made < last:
        number, seconds, loss_sum, rows = len(epochs) + 1, 0.0, 0.0, 0
        for batch in epoch_batches(data.rows, settings.batch_size, settings.seed, number)[: last - made]:
            start = time.perf_counter()
            mine = batch[replica.index :: replica.count]
            batch_loss = _step(model, optimizer, data, mine, world)
            seconds += time.perf_counter() - start
            made, rows, loss_sum = made + 1, rows + len(mine), loss_sum + batch_loss
            mean = batch_loss / max(1, len(mine))
            if not math.isfinite(mean):
                raise DivergedError(f"The loss of step {made} is {mean}: try a lower --learning-rate.")
            watch(Step(made, number, mean, len(mine)))
        test_loss, accuracy = evaluate(model, data, world)
        epochs.append(Epoch(number, made, loss_sum / max(1, rows), test_loss, accuracy, rows, seconds))
        watch(epochs[-1])
    return Outcome(model, optimizer, tuple(epochs))


def _step(model: Perceptron, optimizer: SGD, data: Dataset, rows: NDArray[np.intp], world: World) -> float:
    """One step on rows that all ranks share; returns the summed loss of all of them."""
    mine = rows[world.shard(len(rows))]
    loss, dlogits = cross_entropy(model(data.train_x[mine], training=True), data.train_y[mine])
    model.backward(dlogits / max(1, len(rows)))
    local = [_gradient(weight.gradient) for weight in model.dense_weights]
    *dense, total = world.allreduce([*local, np.array(loss)])
    norms: list[NDArray[Any]] = []
    for norm in model.norms:
        penalties = norm.regularizer_gradients()
        for weight, penalty in zip(norm.trainable_weights, penalties, strict=True):
            norms.append(_gradient(weight.gradient) + penalty)
    optimizer.step([*dense, *norms])
    return float(total)


def _gradient(gradient: NDArray[Any] | None) -> NDArray[Any]:
    assert gradient is not None, "a gradient is read after backward"
    return gradient


def evaluate(model: Perceptron, data: Dataset, world: World) -> tuple[float, float]:
    """The mean cross-entropy and the accuracy over the test rows; each rank looks at its share.

    Raises:
        CollectiveError: another rank is lost, or disagrees.
    """
    for norm in model.norms:
        world.pull(norm)
    share = world.shard(len(data.test_y))
    loss, correct = 0.0, 0
    for start in range(share.start, share.stop, _EVALUATED_AT_ONCE):
        part = slice(start, min(start + _EVALUATED_AT_ONCE, share.stop))
        logits = model(data.test_x[part])
        loss += cross_entropy(logits, data.test_y[part])[0]
        correct += int((logits.argmax(axis=1) == data.test_y[part]).sum())
    losses, hits = world.allreduce([np.array(loss), np.array(correct)])
    return float(losses) / len(data.test_y), int(hits) / len(data.test_y)
