"""`bnlayer train --init-from` with files that real Keras and torch write: the model computes what theirs does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from bnworker.train.initial import Sizes, fitted
from bnworker.train.model import Perceptron
from bnworker.train.weight_files import WeightFileError, read

pytestmark = pytest.mark.keras

HIDDEN = (6, 5)


def outputs(path: Path, x: NDArray[Any], epsilon: float) -> NDArray[Any]:
    """Of the model that begins with a file."""
    model = Perceptron(4, HIDDEN, 3, dtype="float32", seed=1)
    for norm in model.norms:
        norm.epsilon = epsilon
    model.begin(fitted(read(path), Sizes(4, HIDDEN, 3, epsilon)).tensors)
    return model(x)


def drawn(weights: list[NDArray[Any]]) -> list[NDArray[np.float32]]:
    """Other values for all weights, which a variance may have too."""
    rng = np.random.default_rng(3)
    return [rng.uniform(0.5, 1.5, weight.shape).astype(np.float32) for weight in weights]


def sequential() -> Any:
    """As tutorials write it: with and without biases, γ and β, names and Dropout."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6),
            layers.BatchNormalization(epsilon=1e-4),
            layers.ReLU(),
            layers.Dropout(0.5),
            layers.Dense(5, use_bias=False, name="zeroth"),
            layers.BatchNormalization(epsilon=1e-4, center=False),
            layers.Activation("relu"),
            layers.Dense(3),
        ]
    )


def functional() -> Any:
    """The same form by the functional interface."""
    inputs = x = keras.Input((4,))
    for size in HIDDEN:
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(epsilon=1e-4)(keras.layers.Dense(size)(x)))
    return keras.Model(inputs, keras.layers.Dense(3)(x))


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5", "model.npz"])
@pytest.mark.parametrize("make", [sequential, functional])
def test_keras_models(make: Any, name: str, tmp_path: Path) -> None:
    """The whole model, its weights, or its arrays by their paths."""
    theirs, path = make(), tmp_path / name
    theirs.set_weights(drawn(theirs.get_weights()))
    if name == "model.keras":
        theirs.save(path)
    elif name == "model.npz":
        np.savez(path, allow_pickle=False, **{v.path: np.asarray(v) for v in theirs.weights})
    else:
        theirs.save_weights(path)
    if make is sequential and name == "model.weights.h5":
        with pytest.raises(
            WeightFileError, match="has 3 vectors, so that nobody can tell gamma from beta: save the who"
        ):
            read(path)
        return
    x = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    assert outputs(path, x, 1e-4) == pytest.approx(np.asarray(theirs(x, training=False)), rel=1e-4, abs=1e-5)
    if name == "model.keras":
        with pytest.raises(WeightFileError, match=r"have epsilon 0\.0001, and --epsilon is 0\.001"):
            outputs(path, x, 1e-3)


def test_a_keras_model_of_another_form_is_refused(tmp_path: Path) -> None:
    """The activation stands before the normalization: with the same weights ours would compute something else."""
    layers = keras.layers
    made = [keras.Input((4,)), layers.Dense(6, activation="relu"), layers.BatchNormalization(), layers.Dense(3)]
    keras.Sequential(made).save(tmp_path / "model.keras")
    with pytest.raises(WeightFileError, match="received Dense, relu, BatchNormalization, Dense"):
        read(tmp_path / "model.keras")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_torch_models(suffix: str, tmp_path: Path) -> None:
    """A state dict, saved as its users do."""
    layers: list[Any] = []
    for inputs, size in ((4, 6), (6, 5)):
        layers += [torch.nn.Linear(inputs, size), torch.nn.BatchNorm1d(size), torch.nn.ReLU(), torch.nn.Dropout(0.5)]
    theirs = torch.nn.Sequential(*layers, torch.nn.Linear(5, 3))
    state = theirs.state_dict()
    counts = {key for key in state if key.endswith("num_batches_tracked")}
    values = drawn([value.numpy() for key, value in state.items() if key not in counts])
    fresh = dict(zip((key for key in state if key not in counts), map(torch.from_numpy, values), strict=True))
    theirs.load_state_dict({**state, **fresh})
    arrays = {key: np.ascontiguousarray(value.numpy()) for key, value in theirs.state_dict().items()}
    path = tmp_path / f"model{suffix}"
    if suffix == ".npz":
        np.savez(path, allow_pickle=False, **arrays)
    else:
        save_file(arrays, path)
    x = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(x)).numpy()
    assert outputs(path, x, 1e-5) == pytest.approx(expected, rel=1e-4, abs=1e-5)
