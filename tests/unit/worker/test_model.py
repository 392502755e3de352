"""The perceptron: its derivatives, and what it shares between ranks."""

from __future__ import annotations

import numpy as np
import pytest

from bnlayer import Alone
from bnlayer.collective import installed
from bnlayer.variable import Variable
from bnworker.train.model import Perceptron, cross_entropy

RNG = np.random.default_rng(11)
X, Y = RNG.standard_normal((9, 5)), RNG.integers(0, 3, 9)


def loss(model: Perceptron) -> float:
    """Of a training call on the fixed batch."""
    return cross_entropy(model(X, training=True), Y)[0]


def test_every_gradient_against_finite_differences() -> None:
    """All layers' backward passes together, normalization included: float64, central differences."""
    with installed(Alone()):
        model = Perceptron(5, (4, 3), 3, dtype="float64", seed=1)
        model.backward(cross_entropy(model(X, training=True), Y)[1])
        named = model.named_weights()
        gradients = {name: np.asarray(weight.gradient) for name, weight in named.items()}
        for name, weight in named.items():
            assert gradients[name] == pytest.approx(differences(model, weight), rel=1e-5, abs=1e-7), name
    assert list(named) == [
        "dense_1/kernel",
        "dense_2/kernel",
        "dense_3/kernel",
        "dense_3/bias",
        "bn_1/gamma",
        "bn_1/beta",
        "bn_2/gamma",
        "bn_2/beta",
    ]


def differences(model: Perceptron, weight: Variable, h: float = 1e-6) -> np.ndarray:
    """(loss(w + h) − loss(w − h)) / 2h, element by element."""
    value, slope = weight.numpy(), np.zeros(weight.shape)
    for index in np.ndindex(*weight.shape):
        for sign in (1, -1):
            moved = value.copy()
            moved[index] += sign * h
            weight.assign(moved)
            slope[index] += sign * loss(model) / (2 * h)
    weight.assign(value)
    return slope


def test_cross_entropy_by_hand() -> None:
    """Two classes, equal logits: log 2 a row; large logits do not overflow."""
    summed, gradient = cross_entropy(np.zeros((2, 2)), np.array([0, 1]))
    assert summed == pytest.approx(2 * np.log(2))
    assert gradient.tolist() == [[-0.5, 0.5], [0.5, -0.5]]
    assert cross_entropy(np.array([[1e4, 0.0]]), np.array([0]))[0] == 0.0


def test_no_rows() -> None:
    """A rank without rows of a step takes part: it adds zeros."""
    with installed(Alone()):
        model = Perceptron(5, (4,), 3, dtype="float32", seed=1)
        summed, gradient = cross_entropy(model(np.zeros((0, 5), np.float32), training=True), np.zeros(0, np.int64))
        model.backward(gradient)
    assert summed == 0.0
    for name, weight in model.named_weights().items():
        assert weight.gradient is not None, name
        assert not weight.gradient.any(), name


def test_the_seed_makes_the_weights() -> None:
    """Every rank draws the same; another seed draws others."""
    kernels = [Perceptron(5, (4,), 3, dtype="float32", seed=seed).dense[0].kernel.value for seed in (1, 1, 2)]
    assert kernels[0].tobytes() == kernels[1].tobytes()
    assert kernels[0].tobytes() != kernels[2].tobytes()


def test_no_hidden_layer() -> None:
    """Softmax regression: one Dense layer, with a bias, and nothing to synchronize."""
    model = Perceptron(5, (), 3, dtype="float64", seed=1)
    model.backward(cross_entropy(model(X, training=True), Y)[1])
    assert list(model.named_weights()) == ["dense_1/kernel", "dense_1/bias"]


def test_inference_keeps_nothing() -> None:
    """A backward pass after inference is a mistake, not a stale gradient."""
    with installed(Alone()):
        model = Perceptron(5, (4,), 3, dtype="float64", seed=1)
        model(X, training=True)
        model(X)
        with pytest.raises(AssertionError, match="training call"):
            model.backward(np.zeros((9, 3)))


def test_reprs() -> None:
    """The sizes, not the arrays."""
    model = Perceptron(5, (4, 2), 3, dtype="float32", seed=1)
    assert repr(model) == "Perceptron(features=5, hidden=[4, 2], classes=3)"
    assert repr(model.dense[-1]) == "Dense(name='dense_3', inputs=2, outputs=3, bias=True)"
