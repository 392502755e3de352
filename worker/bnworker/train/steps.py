"""One step of training, on rows that all ranks share.

Laws:
1. The loss is the sum over all rows of the step, divided by their number: each rank divides its own sum by the
   number of ALL rows, and the gradients add up.
2. One reduction a step carries the Dense gradients, the loss, and whether a rank was asked to stop. Gamma's and beta's
   gradients are those of all ranks already; regularizers are added once, after the reduction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnworker.train.data import Batch, raise_on_every_rank
from bnworker.train.model import Perceptron, cross_entropy
from bnworker.train.optimizer import SGD
from bnworker.world import World


def step(
    model: Perceptron, optimizer: SGD, batch: Batch, world: World, *, stop: bool = False
) -> tuple[float, int, bool]:
    """One step on rows that all ranks share.

    Args:
        model, optimizer: the same on every rank.
        batch: this rank's rows.
        world: the ranks.
        stop: whether this rank was asked to stop.

    Returns:
        The summed loss and the number of correctly classified rows on all ranks, both before the update; and whether
        any rank was asked to stop, which is the same on all ranks.

    Raises:
        DataError: on every rank: a rank could not read its rows. Only moving statistics were updated.
        CollectiveError: another rank is lost, or disagrees.
    """
    logits = model(batch.x, training=True)
    loss, dlogits = cross_entropy(logits, batch.y)
    correct = int((logits.argmax(axis=1) == batch.y).sum())
    model.backward(dlogits / max(1, batch.rows))
    local = [_gradient(weight.gradient) for weight in model.dense_weights]
    *dense, sums = world.allreduce([*local, np.array([loss, correct, batch.problem is not None, stop], np.float64)])
    total, right, problems, stops = sums.tolist()
    if problems:
        raise_on_every_rank(world, batch.problem)
    norms: list[NDArray[Any]] = []
    for norm in model.norms:
        for weight, penalty in zip(norm.trainable_weights, norm.regularizer_gradients(), strict=True):
            norms.append(_gradient(weight.gradient) + penalty)
    optimizer.step([*dense, *norms])
    return total, round(right), stops > 0


def _gradient(gradient: NDArray[Any] | None) -> NDArray[Any]:
    assert gradient is not None, "a gradient is read after backward"
    return gradient
