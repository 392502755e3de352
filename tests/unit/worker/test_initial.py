"""`bnlayer train --init-from`: weights of Keras, torch and our own, fitted to the model or refused by name.

Keras's own files stand in `tests/conformance`, where Keras is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from bnlayer.interchange import save
from bnworker.train import weight_files
from bnworker.train.initial import Initial, Sizes, fitted
from bnworker.train.model import Perceptron
from bnworker.train.weight_files import WeightFileError, read
from support.command_line import Command
from support.files import trained

Arrays = dict[str, NDArray[Any]]

SIZES = Sizes(4, (6, 6), 3, 1e-3)
TORCH_NAMES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def values(*shape: int) -> NDArray[np.float32]:
    """Numbers between 0.5 and 1.5, of each shape its own."""
    return np.random.default_rng(shape).uniform(0.5, 1.5, shape).astype(np.float32)


def layers(*, biases: bool = True) -> list[Arrays]:
    """Of the model in its order, Dense and normalization by turns, in Keras's words; each array is another one."""
    made: list[Arrays] = []
    for number, (inputs, outputs) in enumerate(((4, 6), (6, 6), (6, 3)), 1):
        dense = {"kernel": number * values(inputs, outputs)}
        made.append({**dense, "bias": number * values(outputs)} if biases or number == 3 else dense)
        if number < 3:
            made.append({name: number * values(outputs, k)[:, 0] for k, name in enumerate(TORCH_NAMES, 1)})
    return made


def torch_state(names: list[str], *, biases: bool = True) -> Arrays:
    """A state dict of layers so named."""
    state: Arrays = {}
    for name, layer in zip(names, layers(biases=biases), strict=True):
        if "kernel" in layer:
            state[f"{name}.weight"] = np.ascontiguousarray(layer["kernel"].T)
            state |= {f"{name}.bias": layer["bias"]} if "bias" in layer else {}
        else:
            state |= {f"{name}.{TORCH_NAMES[weight]}": array for weight, array in layer.items()}
            state[f"{name}.num_batches_tracked"] = np.array(7)
    return state


def keras_paths(names: list[str]) -> Arrays:
    """A Keras model's arrays by their paths."""
    named = zip(names, layers(), strict=True)
    return {f"sequential/{name}/{weight}": array for name, layer in named for weight, array in layer.items()}


def outputs(x: NDArray[Any]) -> NDArray[np.float64]:
    """What the layers compute in inference mode, by the formulas."""
    h = x
    for layer in layers():
        if "kernel" in layer:
            h = h @ layer["kernel"] + layer["bias"]
        else:
            h = layer["gamma"] * (h - layer["moving_mean"]) / np.sqrt(layer["moving_variance"] + 1e-3) + layer["beta"]
            h = np.maximum(h, 0)
    return np.asarray(h, np.float64)


def model(initial: Initial) -> Perceptron:
    """The model that begins so."""
    made = Perceptron(4, (6, 6), 3, dtype="float64", seed=1)
    made.begin(initial.tensors)
    return made


NUMBERED = [str(number) for number in (0, 1, 3, 4, 12)]  # of a Sequential with ReLUs and Dropouts; 12 comes after 3
NAMED = ["net.entry", "net.norm_a", "net.body", "net.norm_b", "net.head"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("arrays", "origin"),
    [
        (torch_state(NUMBERED), "dense_1 from 0, dense_2 from 3, dense_3 from 12, bn_1 from 1, bn_2 from 4"),
        (
            torch_state(["fc1", "bn1", "fc2", "bn2", "out"]),
            "dense_1 from fc1, dense_2 from fc2, dense_3 from out, bn_1 ",
        ),
        (torch_state(["fc1", "bn1", "fc2", "bn2", "a"]), "dense_1 from fc1, dense_2 from fc2, dense_3 from a, bn_1 "),
        (
            keras_paths(["dense", "batch_normalization", "dense_1", "batch_normalization_1", "dense_2"]),
            "dense_1 from sequential/dense, dense_2 from sequential/dense_1, dense_3 from sequential/dense_2, bn_1 ",
        ),
    ],
)
def test_a_model_begins_as_the_file_ends(suffix: str, arrays: Arrays, origin: str, tmp_path: Path) -> None:
    """Order, orientation, and biases before a normalization: the same outputs, whatever the container's own order."""
    path = tmp_path / f"model{suffix}"
    if suffix == ".npz":
        np.savez(path, allow_pickle=False, **dict(sorted(arrays.items(), reverse=True)))
    else:
        save_file(arrays, path)
    initial = fitted(read(path), SIZES)
    assert initial.text.startswith(f"weights of {path}: {origin}")
    assert initial.text.endswith("; it does not say epsilon: 0.001")
    x = np.random.default_rng(0).standard_normal((50, 4))
    assert model(initial)(x) == pytest.approx(outputs(x), rel=1e-5)


def test_names_without_numbers_go_by_the_order_of_a_npz_and_are_refused_of_safetensors(tmp_path: Path) -> None:
    """Two normalizations of one size, sorted by their names: nobody can tell which is the first."""
    state = torch_state(["in", "zeta", "mid", "alpha", "out"])
    np.savez(tmp_path / "model.npz", allow_pickle=False, **state)
    assert "bn_1 from zeta, bn_2 from alpha" in fitted(read(tmp_path / "model.npz"), SIZES).text
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightFileError) as caught:
        fitted(read(tmp_path / "model.safetensors"), SIZES)
    text = str(caught.value)
    assert "nobody can tell the order of its batch normalizations alpha, zeta: some have the same shape" in text
    assert "save as .npz, in the order of the model" in text


def test_what_a_layer_lacks_is_made_up_for(tmp_path: Path) -> None:
    """No γ is 1, no β or last bias 0; bfloat16 is taken."""
    state = torch_state(NUMBERED, biases=False)
    for name in ("1.weight", "1.bias", "4.bias", "12.bias"):
        del state[name]
    state = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items() if "num" not in name}
    save_file(state, tmp_path / "model.safetensors")
    tensors = fitted(read(tmp_path / "model.safetensors"), SIZES).tensors
    assert list(tensors) == SIZES.names()
    assert tensors["bn_1/gamma"].tolist() == [1.0] * 6
    assert tensors["bn_1/beta"].tolist() == tensors["bn_2/beta"].tolist() == [0.0] * 6
    assert tensors["dense_3/bias"].tolist() == [0.0] * 3
    assert np.array_equal(tensors["bn_2/gamma"], state["4.weight"])


def changed(**arrays: NDArray[Any] | None) -> Arrays:
    """The numbered state with other arrays, or without: "_0_weight" is "0.weight"."""
    state = torch_state(NUMBERED)
    for key, array in arrays.items():
        layer, name = key[1:].split("_", 1)
        del state[f"{layer}.{name}"]
        if array is not None:
            state[f"{layer}.{name}"] = array
    return state


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (
            changed(_3_weight=values(5, 6), _3_bias=values(5)),
            "layer '3': expected shape (6, 6), received (5, 6); the model of --data and --hidden is 4 → 6 → 6 → 3.",
        ),
        (
            {name: array for name, array in torch_state(NUMBERED).items() if not name.startswith(("3.", "4."))},
            "expected 3 Dense layers, received 2: 0(4, 6), 12(6, 3); the model of --data and --hidden is 4 → 6 → 6 → 3",
        ),
        (
            {name: array for name, array in torch_state(NUMBERED).items() if not name.startswith("4.")},
            "expected 2 batch normalizations, received 1: 1(6,); the model of",
        ),
        (
            changed(_1_running_mean=None),
            "layer '1': expected a Dense layer's matrix, or a batch normalization with its",
        ),
        (changed(_1_running_var=None), "layer '1' has a moving mean, but no moving variance."),
        (
            changed(_1_weight=values(5)),
            "layer '1': expected gamma of one dimension and the length of its moving mean, ",
        ),
        (changed(_0_bias=values(5)), "layer '0': expected a bias of shape (6,), received (5,)."),
        (changed(_0_weight=values(6, 4, 1, 1)), "layer '0': expected a Dense layer's matrix, or a batch normalization"),
        (
            {**torch_state(NUMBERED), "scale": values(3)},
            "tensor 'scale' is none of a multi-layer perceptron's: expected",
        ),
        (
            changed(_0_weight=np.full((6, 4), np.nan)),
            "layer '0': expected kernel of finite floats, received values that",
        ),
        (changed(_4_running_var=np.full(6, -1e-30, np.float32)), "layer '4': a moving variance is below 0."),
        (changed(_12_bias=np.arange(3)), "layer '12': expected bias of finite floats, received int64."),
    ],
)
def test_what_does_not_fit_is_named(state: Arrays, text: str, tmp_path: Path) -> None:
    """The file, the layer, what was expected, and what was received."""
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(WeightFileError) as caught:
        fitted(read(path), SIZES)
    assert str(caught.value).startswith(f"{path}: {text}")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "model.pt",
            b"",
            ".pt files are pickles, which can run any code when they are read, and are refused. In torch: ",
        ),
        (
            "model.onnx",
            b"",
            "expected .keras or .weights.h5 of Keras 3; .safetensors or .npz with the arrays of a torch",
        ),
        ("model.npz", b"PK", "expected a whole .npz archive, received 2 bytes: "),
        ("model.safetensors", b"", "expected a whole safetensors file, received 0 bytes: "),
        ("model.keras", b"PK", "expected a whole .keras file of Keras 3: "),
        ("none.npz", None, "cannot be read: No such file or directory."),
    ],
)
def test_other_files_are_refused(name: str, content: bytes | None, text: str, tmp_path: Path) -> None:
    """A pickle above all, with what torch can write instead."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightFileError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: {text}")


def test_keras_files_need_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said, and what does without."""
    monkeypatch.setitem(sys.modules, "h5py", None)
    path = tmp_path / "model.weights.h5"
    path.write_bytes(b"")
    with pytest.raises(WeightFileError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}: Keras's files need h5py, which is not installed: pip install 'bnlayer[keras-files]'. Or, where Keras "
        "is: numpy.savez('weights.npz', **{v.path: v.numpy() for v in model.weights})."
    )


def config(*classes: Any) -> dict[str, Any]:
    """A Keras model's configuration, as far as it is read."""
    listed = [one if isinstance(one, tuple) else (one, {}) for one in classes]
    return {"class_name": "Sequential", "config": {"layers": [{"class_name": k, "config": c} for k, c in listed]}}


@pytest.mark.parametrize(
    ("classes", "received"),
    [
        ((("Dense", {"activation": "relu"}), "BatchNormalization", "Dense"), "Dense, relu, BatchNormalization, Dense"),
        (
            ("Dense", "BatchNormalization", ("Activation", {"activation": "tanh"}), "Dense"),
            "Dense, BatchNormalization, t",
        ),
        (
            ("Dense", "BatchNormalization", ("ReLU", {"max_value": 6}), "Dense"),
            "Dense, BatchNormalization, a ReLU with",
        ),
        (("Conv2D", "BatchNormalization", "ReLU", "Dense"), "Conv2D, BatchNormalization, relu, Dense"),
    ],
)
def test_keras_models_of_another_form_are_refused(classes: tuple[Any, ...], received: str) -> None:
    """They would compute something else with the same weights."""
    with pytest.raises(WeightFileError) as caught:
        weight_files._layers("model.keras", config(*classes))
    assert f"then Dense, which is what `bnlayer train` trains; received {received}" in str(caught.value)
    with pytest.raises(WeightFileError, match="expected a Sequential or functional model of Keras, received 'Mine'"):
        weight_files._layers("model.keras", {"class_name": "Mine", "config": {}})


TRAIN = ("train", "--data", "rows.npz", "--transport", "none", "--hidden", "6,6", "--batch-size", "20")


@pytest.fixture
def run(command: Command) -> Command:
    """The command, where there is data, and a checkpoint of a short run on it."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 100)
    np.savez("rows.npz", x=rng.standard_normal((100, 4)) + 2 * np.eye(3, 4)[y], y=y)
    code, _, err = command(*TRAIN, "--epochs", "2", "--save", "run.safetensors", "--summary", "first.json")
    assert code == 0, err
    return command


@pytest.mark.parametrize("names", ["keras", "torch", "checkpoint"])
def test_exports_and_checkpoints_are_begun_from(run: Command, names: str) -> None:
    """Steps that change nothing leave the accuracy of the run that they come from; the layers are listed."""
    name = "run.safetensors"
    if names != "checkpoint":
        name = f"weights{'.npz' if names == 'keras' else '.safetensors'}"
        assert run("export", "run.safetensors", name, "--names", names)[0] == 0
    frozen = ("--learning-rate", "0", "--bn-momentum", "1", "--epochs", "1", "--summary", "second.json")
    code, out, err = run(*TRAIN, *frozen, "--seed", "9", "--init-from", name)
    assert (code, err) == (0, "")
    assert out.startswith(f"weights of {name}: dense_1 from dense_1, dense_2 from dense_2, dense_3 from dense_3, bn_1 ")
    first, second = (json.loads(Path(file).read_text()) for file in ("first.json", "second.json"))
    for figure in ("test_accuracy", "test_loss"):
        assert second[figure] == first[figure]
    for was, now in zip(first["layers"], second["layers"], strict=True):
        assert (was["moving_mean"], was["moving_variance"]) == (now["moving_mean"], now["moving_variance"])
    assert second["settings"]["init_from"] == name


def test_a_resumed_run_goes_on_from_its_checkpoint_alone(run: Command) -> None:
    """The weights that it began with may be gone; other ones are another run."""
    run("export", "run.safetensors", "weights.npz")
    saved = ("--init-from", "weights.npz", "--save", "second.safetensors", "--resume")
    assert run(*TRAIN, "--epochs", "1", *saved)[0] == 0
    Path("weights.npz").unlink()
    code, out, err = run(*TRAIN, "--epochs", "2", *saved)
    assert (code, err) == (0, "")
    assert "resumed after step 4" in out and "weights of" not in out
    code, _, err = run(*TRAIN, "--epochs", "3", "--save", "second.safetensors", "--resume")
    assert code == 2
    assert "--init-from was weights.npz, now not given" in err


def test_what_cannot_be_begun_from_is_one_line(run: Command) -> None:
    """Before anything is started, or with --dry-run, as far as the file says it; exit code 2."""
    run("export", "run.safetensors", "weights.npz")
    save("layers.npz", {"bn_1": trained()})
    for options, text in (
        (("--init-from", "model.pt"), "bnlayer: train: model.pt: .pt files are pickles"),
        (
            ("--init-from", "layers.npz"),
            "layers.npz: holds normalizations alone, without the Dense layers between them.",
        ),
        (
            ("--init-from", "weights.npz", "--hidden", "6,5"),
            "layer 'dense_2': expected shape (6, 5), received (6, 6); ",
        ),
        (("--init-from", "weights.npz", "--hidden", "6,5", "--dry-run"), "layer 'dense_2': expected shape (6, 5), rec"),
        (
            ("--init-from", "run.safetensors", "--epsilon", "0.5"),
            "with which the same weights compute something else. Give --epsilon 0.001.",
        ),
    ):
        code, _, err = run(*TRAIN, *options)
        assert (code, err.count("\n")) == (2, 1), err
        assert text in err
    code, out, _ = run(*TRAIN, "--init-from", "weights.npz", "--dry-run")
    assert code == 0 and "the beginning, with the weights of weights.npz" in out
