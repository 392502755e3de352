"""Stochastic gradient descent with momentum, in Keras's convention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.variable import Variable


class SGD:
    """Updates weights by gradients that are the same on every rank, so the weights stay so too.

        velocity ← momentum·velocity − learning_rate·gradient
        weight   ← constraint(weight + velocity)

    Args:
        weights: what is updated; each keeps its own velocity.
        learning_rate: per step.
        momentum: 0 for none.

    Source: `keras.optimizers.SGD`, without Nesterov's variant.
    """

    def __init__(self, weights: Sequence[Variable], *, learning_rate: float, momentum: float) -> None:
        self.weights = list(weights)
        self.velocities = [np.zeros_like(weight.value) for weight in self.weights]
        self._learning_rate = learning_rate
        self._momentum = momentum

    def step(self, gradients: Sequence[NDArray[Any]]) -> None:
        """Update every weight.

        Args:
            gradients: one per weight, complete: of all ranks, regularizers included.
        """
        for index, (weight, gradient) in enumerate(zip(self.weights, gradients, strict=True)):
            velocity = self._momentum * self.velocities[index] - self._learning_rate * gradient
            updated = weight.value + velocity
            self.velocities[index] = velocity
            weight.assign(updated if weight.constraint is None else weight.constraint(updated))
