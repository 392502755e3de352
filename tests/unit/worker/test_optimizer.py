"""Gradient descent with momentum."""

from __future__ import annotations

import numpy as np
import pytest

from bnlayer.constraints import NonNeg
from bnlayer.variable import Variable
from bnworker.train.optimizer import SGD


def test_two_steps_by_hand() -> None:
    """v = 0.9 v − 0.1 g; w = w + v. Powers of two keep the numbers exact."""
    weight = Variable(np.array([1.0, 2.0]), "w", True)
    descent = SGD([weight], learning_rate=0.25, momentum=0.5)
    descent.step([np.array([4.0, 0.0])])
    assert weight.value.tolist() == [0.0, 2.0]
    descent.step([np.array([0.0, 8.0])])
    assert weight.value.tolist() == [-0.5, 0.0]
    assert descent.velocities[0].tolist() == [-0.5, -2.0]


def test_the_constraint_comes_after_the_update() -> None:
    """The velocity is not projected: Keras's order."""
    weight = Variable(np.array([1.0]), "w", True, constraint=NonNeg())
    descent = SGD([weight], learning_rate=1.0, momentum=0.0)
    descent.step([np.array([5.0])])
    assert weight.value.tolist() == [0.0]
    assert descent.velocities[0].tolist() == [-5.0]


def test_the_dtype_stays() -> None:
    """A Python float must not widen float32 weights."""
    weight = Variable(np.ones(3, np.float32), "w", True)
    descent = SGD([weight], learning_rate=0.1, momentum=0.9)
    descent.step([np.ones(3, np.float32)])
    assert weight.value.dtype == descent.velocities[0].dtype == np.float32


def test_one_gradient_per_weight() -> None:
    """A forgotten gradient must not shift the others."""
    with pytest.raises(ValueError, match="shorter"):
        SGD([Variable(np.ones(1), "w", True)], learning_rate=0.1, momentum=0).step([])


def test_the_decay_is_decoupled() -> None:
    """w = w·(1 − rate·decay) + v: it enters neither the velocity nor weights that it was not asked for."""
    kernel, bias = Variable(np.array([8.0]), "kernel", True), Variable(np.array([8.0]), "bias", True)
    descent = SGD([kernel, bias], learning_rate=0.5, momentum=0.5, weight_decay=0.25, decayed=[kernel])
    descent.step([np.array([2.0]), np.array([2.0])])
    assert kernel.value.tolist() == [8.0 * (1 - 0.125) - 1.0]
    assert bias.value.tolist() == [7.0]
    assert [velocity.tolist() for velocity in descent.velocities] == [[-1.0], [-1.0]]


def test_the_rate_can_change() -> None:
    """A schedule assigns it; the velocity keeps what it gathered at the old one."""
    weight = Variable(np.array([0.0]), "w", True)
    descent = SGD([weight], learning_rate=1.0, momentum=0.5)
    descent.step([np.array([4.0])])
    descent.learning_rate = 0.0
    descent.step([np.array([4.0])])
    assert descent.velocities[0].tolist() == [-2.0]
    assert weight.value.tolist() == [-6.0]
