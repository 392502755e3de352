"""Stochastic gradient descent with momentum and decoupled weight decay, in Keras's convention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.variable import Variable


class SGD:
    """Updates weights by gradients that are the same on every rank, so the weights stay so too.

        velocity ← momentum·velocity − learning_rate·gradient
        weight   ← constraint(weight·(1 − learning_rate·weight_decay) + velocity)

    The decay acts on the weight, not through the gradient and the velocity (that would be an L2 penalty), and on
    the weights in `decayed` alone: decaying biases, gammas and betas does not regularize the model.

    Args:
        weights: the weights to update; each has its own velocity.
        learning_rate: per step; a schedule assigns the attribute before each step.
        momentum: 0 for none.
        weight_decay: 0 for none.
        decayed: the weights that the decay acts on.

    Attributes:
        velocities: one array per weight.

    Source: `keras.optimizers.SGD`, without Nesterov's variant; Loshchilov and Hutter, "Decoupled Weight Decay
    Regularization" (2019).
    """

    def __init__(
        self,
        weights: Sequence[Variable],
        *,
        learning_rate: float,
        momentum: float,
        weight_decay: float = 0.0,
        decayed: Sequence[Variable] = (),
    ) -> None:
        self.weights = list(weights)
        self.velocities = [np.zeros_like(weight.value) for weight in self.weights]
        self.learning_rate = learning_rate
        self._momentum = momentum
        self._decay = weight_decay
        self._decayed = {id(weight) for weight in decayed} if weight_decay else set()

    def step(self, gradients: Sequence[NDArray[Any]]) -> None:
        """Update every weight.

        Args:
            gradients: one for each weight: summed over all ranks, regularizers included.
        """
        for index, (weight, gradient) in enumerate(zip(self.weights, gradients, strict=True)):
            velocity = self._momentum * self.velocities[index] - self.learning_rate * gradient
            decayed = weight.value
            if id(weight) in self._decayed:
                decayed = decayed * (1.0 - self.learning_rate * self._decay)
            updated = decayed + velocity
            self.velocities[index] = velocity
            weight.assign(updated if weight.constraint is None else weight.constraint(updated))
