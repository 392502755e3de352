"""How good a model is, over rows that all ranks share out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnworker.train.data import Batch, DataError, Dataset, raise_on_every_rank
from bnworker.train.model import Perceptron, cross_entropy
from bnworker.world import World

_CONFUSION_CLASSES = 200  # beyond, K·K numbers are unreadable, and costly to send


@dataclass(frozen=True, slots=True)
class Scores:
    """Mean cross-entropy and accuracy of a model.

    Attributes:
        test_loss, test_accuracy: over the test rows.
        validation_loss, validation_accuracy: over the validation rows; None without any.
        waiting: what each rank said of itself, in rank order.
    """

    test_loss: float
    test_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    waiting: tuple[float, ...]


def evaluate(model: Perceptron, data: Dataset, world: World, waiting: float = 0.0) -> Scores:
    """Judge a model by its owner's moving statistics; each rank looks at its share of the rows.

    Args:
        model: the same on every rank.
        data: that it is judged by.
        world: the ranks.
        waiting: a number of this rank's own, which all ranks are told in the same exchange.

    Raises:
        DataError: on every rank: one could not read its rows.
        CollectiveError: another rank is lost, or disagrees.
    """
    for norm in model.norms:
        world.pull(norm)
    *test, test_problem = _summed(model, data.test())
    *validation, validation_problem = _summed(model, data.validation())
    problem = test_problem or validation_problem
    waits = np.zeros(world.world_size)
    waits[world.rank] = waiting
    sums, waits = world.allreduce([np.array([*test, *validation, problem is not None], np.float64), waits])
    test_loss, test_correct, validation_loss, validation_correct, problems = sums.tolist()
    if problems:
        raise_on_every_rank(world, problem)
    evaluated = data.validation_rows
    return Scores(
        test_loss / data.test_rows,
        test_correct / data.test_rows,
        validation_loss / evaluated if evaluated else None,
        validation_correct / evaluated if evaluated else None,
        tuple(waits.tolist()),
    )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How a model does on some rows, class by class.

    Shape suffixes: K classes.

    Attributes:
        rows: how many.
        loss: mean cross-entropy.
        rows_K: of each class.
        predicted_K: how many rows were taken for each class.
        correct_K: how many of them rightly.
        confusion_KK: rows of class i that were taken for class j, at [i, j]; None above 200 classes.
    """

    rows: int
    loss: float
    rows_K: NDArray[np.int64]
    predicted_K: NDArray[np.int64]
    correct_K: NDArray[np.int64]
    confusion_KK: NDArray[np.int64] | None

    @property
    def accuracy(self) -> float:
        """The share of the rows that were classified rightly."""
        return float(self.correct_K.sum()) / self.rows


def evaluate_splits(model: Perceptron, data: Dataset, world: World, splits: Iterable[str]) -> Evaluation:
    """Judge a model by its own moving statistics, on chosen rows; every rank calls it.

    Args:
        model: the same on every rank, moving statistics included.
        data: with the model's features and labels.
        world: the ranks.
        splits: of "train", "validation" and "test".

    Raises:
        DataError: on every rank: there are no such rows, or one rank could not read its own.
        CollectiveError: another rank is lost, or disagrees.
    """
    parts = {"train": data.training, "validation": data.validation, "test": data.test}
    classes, loss = data.classes, 0.0
    counts_3K = np.zeros((3, classes), np.int64)
    confusion_KK = np.zeros((classes, classes) if classes <= _CONFUSION_CLASSES else (0, classes), np.int64)
    problem: DataError | None = None
    for batch, logits_BK in _evaluated(model, chain.from_iterable(parts[split]() for split in splits)):
        problem = problem or batch.problem
        predicted_B = logits_BK.argmax(axis=1)
        loss += cross_entropy(logits_BK, batch.y)[0]
        seen = (batch.y, predicted_B, batch.y[predicted_B == batch.y])
        counts_3K += np.stack([np.bincount(of_B, minlength=classes) for of_B in seen])
        if len(confusion_KK):
            np.add.at(confusion_KK, (batch.y, predicted_B), 1)
    losses, counts_3K, confusion_KK = world.allreduce([np.array(loss), counts_3K, confusion_KK])
    raise_on_every_rank(world, problem)
    rows_K, predicted_K, correct_K = counts_3K
    rows = int(rows_K.sum())
    if not rows:
        raise DataError(f"{data.name} has no such rows: {' or '.join(splits)}.")
    confusion = confusion_KK if len(confusion_KK) else None
    return Evaluation(rows, float(losses) / rows, rows_K, predicted_K, correct_K, confusion)


def _evaluated(model: Perceptron, batches: Iterable[Batch]) -> Iterator[tuple[Batch, NDArray[Any]]]:
    """Each batch with the model's logits."""
    return ((batch, model(batch.x)) for batch in batches)


def _summed(model: Perceptron, batches: Iterator[Batch]) -> tuple[float, int, DataError | None]:
    """Summed loss, rows classified rightly, and the first problem, of this rank's share."""
    loss, correct = 0.0, 0
    problem: DataError | None = None
    for batch, logits in _evaluated(model, batches):
        problem = problem or batch.problem
        loss += cross_entropy(logits, batch.y)[0]
        correct += int((logits.argmax(axis=1) == batch.y).sum())
    return loss, correct, problem
