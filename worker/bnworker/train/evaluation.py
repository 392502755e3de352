"""How good a model is, over rows that all ranks share out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bnworker.train.data import Batch, DataError, Dataset, raise_on_every_rank
from bnworker.train.model import Perceptron, cross_entropy
from bnworker.world import World


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


def _summed(model: Perceptron, batches: Iterator[Batch]) -> tuple[float, int, DataError | None]:
    """Summed loss, rows classified rightly, and the first problem, of this rank's share."""
    loss, correct = 0.0, 0
    problem: DataError | None = None
    for batch in batches:
        problem = problem or batch.problem
        logits = model(batch.x)
        loss += cross_entropy(logits, batch.y)[0]
        correct += int((logits.argmax(axis=1) == batch.y).sum())
    return loss, correct, problem
