"""Loss, accuracy and confusion matrix of a model; each rank evaluates its share of the rows."""

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

_CONFUSION_CLASSES = 200  # above it, a matrix of K·K numbers can't be read, and is costly to send


@dataclass(frozen=True, slots=True)
class Scores:
    """Mean cross-entropy and accuracy of a model.

    Attributes:
        test_loss, test_accuracy: over the test rows.
        validation_loss, validation_accuracy: over the validation rows; None without any.
        waiting: each rank's `waiting`, in rank order.
    """

    test_loss: float
    test_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    waiting: tuple[float, ...]


def evaluate(model: Perceptron, data: Dataset, world: World, waiting: float = 0.0) -> Scores:
    """Evaluate a model on the validation and test rows, with its owner's moving statistics; every rank calls it.

    Args:
        model: the same on every rank.
        data: with the model's features and labels.
        world: the ranks.
        waiting: seconds that this rank spent inside exchanges; they are gathered in the same allreduce.

    Raises:
        DataError: on every rank: a rank could not read its rows.
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
    """The results of a model on some rows, class by class.

    Shape suffixes: K classes.

    Attributes:
        rows: how many.
        loss: mean cross-entropy.
        rows_K: rows of each class.
        predicted_K: rows that the model assigned to each class.
        correct_K: how many of these are of that class.
        confusion_KK: [i, j] is the number of rows of class i that were assigned to class j; None above 200 classes.
    """

    rows: int
    loss: float
    rows_K: NDArray[np.int64]
    predicted_K: NDArray[np.int64]
    correct_K: NDArray[np.int64]
    confusion_KK: NDArray[np.int64] | None

    @property
    def accuracy(self) -> float:
        """The share of the rows that were classified correctly."""
        return float(self.correct_K.sum()) / self.rows


def evaluate_splits(model: Perceptron, data: Dataset, world: World, splits: Iterable[str]) -> Evaluation:
    """Evaluate a model on chosen splits, with its own moving statistics; every rank calls it.

    Args:
        model: the same on every rank, moving statistics included.
        data: with the model's features and labels.
        world: the ranks.
        splits: any of "train", "validation" and "test".

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
    """Summed loss, correctly classified rows and the first problem of this rank's share."""
    loss, correct = 0.0, 0
    problem: DataError | None = None
    for batch, logits in _evaluated(model, batches):
        problem = problem or batch.problem
        loss += cross_entropy(logits, batch.y)[0]
        correct += int((logits.argmax(axis=1) == batch.y).sum())
    return loss, correct, problem
