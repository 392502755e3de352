"""Reading the weights of a multi-layer perceptron from files of Keras, torch or bnlayer.

| file | contents |
|---|---|
| `.keras`, `.weights.h5` | a Keras 3 model, or its weights; needs h5py |
| `.safetensors`, `.npz` | arrays by name: a torch state dict, a Keras model's variables by their paths, or an export |
| `.safetensors` | a checkpoint of `bnlayer train` |

Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.interchange.containers import arrays_in
from bnworker.train import checkpoint, export

ACCEPTED = (
    ".keras or .weights.h5 of Keras 3; .safetensors or .npz with the arrays of a torch state dict, or of a Keras "
    "model by their paths; or what `bnlayer export` or `bnlayer train --save` wrote"
)

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_IGNORED = "num_batches_tracked"
_TORCH = {
    "weight": "weight",
    "bias": "bias",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
_KERAS = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
_DENSE, _NORM = "dense", "batch_normalization"  # Keras's names of groups
# Vectors of a batch normalization in Keras's order, by their number; with three, gamma and beta can't be told apart.
_VECTORS = {
    2: ("moving_mean", "moving_variance"),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
    7: ("gamma", "beta", "moving_mean", "moving_variance"),  # and three of renorm, which inference does not use
}


class WeightFileError(ValueError):
    """The file's weights can't initialize this model; the text names the file, and says what to do."""


@dataclass(frozen=True, eq=False)
class Dense:
    """A Dense layer.

    Attributes:
        name: in the file.
        kernel: (inputs, outputs).
        bias: (outputs,); None: the layer has none.
        turned: whether the file holds the kernel transposed, as (outputs, inputs).
    """

    name: str
    kernel: NDArray[Any]
    bias: NDArray[Any] | None
    turned: bool


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch normalization; each vector is (channels,).

    Attributes:
        name: in the file.
        gamma, beta: None if the layer has none.
        mean, variance: the moving statistics.
    """

    name: str
    gamma: NDArray[Any] | None
    beta: NDArray[Any] | None
    mean: NDArray[Any]
    variance: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Weights:
    """The contents of a file.

    Attributes:
        file: its name.
        dense, norms: the layers, in order.
        ordered: whether the file states the order of its layers; otherwise they are in the order of their names.
        epsilon: of all normalizations; None: the file does not state it.
    """

    file: str
    dense: tuple[Dense, ...]
    norms: tuple[Norm, ...]
    ordered: bool
    epsilon: float | None = None


def read(path: Path) -> Weights:
    """Read the weights in a file.

    Raises:
        WeightFileError: the file can't be read, or does not hold such weights.
    """
    if path.suffix in _PICKLES:
        raise WeightFileError(
            f"{path}: {path.suffix} files are pickles, which can run any code when they are read, and are refused. "
            "In torch: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
        )
    if path.suffix not in (".keras", ".h5", ".safetensors", ".npz"):
        raise WeightFileError(f"{path}: expected {ACCEPTED}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WeightFileError(f"{path}: cannot be read: {error.strerror}.") from None
    if path.suffix == ".keras":
        return _keras_archive(str(path), content)
    if path.suffix == ".h5":
        return _of_groups(str(path), _groups(str(path), content), None)
    return _by_name(str(path), path.suffix, content)


# ---- arrays by name ----


def _by_name(file: str, suffix: str, content: bytes) -> Weights:
    arrays, epsilon = _arrays(file, suffix, content)
    layers: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in arrays.items():
        layer, weight = _split(file, name)
        if weight != _IGNORED:
            layers.setdefault(layer, {})[weight] = array
    norms = [_norm(file, layer, parts) for layer, parts in layers.items() if "moving_mean" in parts]
    dense = [_dense(file, layer, parts) for layer, parts in layers.items() if "moving_mean" not in parts]
    ordered = suffix == ".npz"  # safetensors sorts
    if numbered(dense) or not ordered:
        dense.sort(key=lambda one: _natural(one.name))
    if numbered(norms) or not ordered:
        norms.sort(key=lambda one: _natural(one.name))
    return Weights(file, tuple(dense), tuple(norms), ordered, epsilon)


def _arrays(file: str, suffix: str, content: bytes) -> tuple[Mapping[str, NDArray[Any]], float | None]:
    """The arrays of a file by name, and its epsilon; None if the file does not state it."""
    try:
        arrays, description = arrays_in(suffix, content)
    except ValueError as error:
        raise WeightFileError(f"{file}: {error}") from None
    if description is None:
        return arrays, None
    if suffix != ".safetensors" or '"settings"' not in description:
        raise WeightFileError(
            f"{file}: holds normalizations alone, without the Dense layers between them. Of a checkpoint, "
            "`bnlayer export FILE OUT --names keras` writes both."
        )
    try:
        decoded = checkpoint.decode(content, file)
    except checkpoint.CheckpointError as error:
        raise WeightFileError(str(error)) from None
    return export.weights(decoded, "keras"), decoded.settings.get("epsilon")


def _split(file: str, name: str) -> tuple[str, str]:
    """A layer's name, and the name of the array in it: as in Keras, or torch's `weight`."""
    layer, _, weight = name.removesuffix(":0").rpartition("/")
    if layer and weight in _KERAS:
        return layer, weight
    layer, _, weight = name.rpartition(".")
    if layer and weight in (*_TORCH, _IGNORED):
        return layer, _TORCH.get(weight, weight)
    raise WeightFileError(
        f"{file}: tensor {name!r} is none of a multi-layer perceptron's: expected Keras's LAYER/kernel, bias, gamma, "
        "beta, moving_mean, moving_variance, or torch's LAYER.weight, bias, running_mean, running_var."
    )


def _norm(file: str, layer: str, parts: Mapping[str, NDArray[Any]]) -> Norm:
    if "moving_variance" not in parts:
        raise WeightFileError(f"{file}: layer {layer!r} has a moving mean, but no moving variance.")
    gamma, beta = parts.get("gamma", parts.get("weight")), parts.get("beta", parts.get("bias"))
    vectors = {"gamma": gamma, "beta": beta, "mean": parts["moving_mean"], "variance": parts["moving_variance"]}
    shape = parts["moving_mean"].shape
    for name, vector in vectors.items():
        if vector is not None and (vector.ndim != 1 or vector.shape != shape):
            raise WeightFileError(
                f"{file}: layer {layer!r}: expected {name} of one dimension and the length of its moving mean, "
                f"received shapes {vector.shape} and {shape}."
            )
    return Norm(layer, gamma, beta, parts["moving_mean"], parts["moving_variance"])


def _dense(file: str, layer: str, parts: Mapping[str, NDArray[Any]]) -> Dense:
    turned = "kernel" not in parts
    kernel = parts.get("kernel", parts.get("weight"))
    if kernel is None or kernel.ndim != 2:
        received = ", ".join(f"{name}{array.shape}" for name, array in parts.items())
        raise WeightFileError(
            f"{file}: layer {layer!r}: expected a Dense layer's matrix, or a batch normalization with its moving "
            f"statistics, received {received}. A multi-layer perceptron has no other layers."
        )
    kernel = kernel.T if turned else kernel
    bias = parts.get("bias")
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise WeightFileError(
            f"{file}: layer {layer!r}: expected a bias of shape {kernel.shape[1:]}, received {bias.shape}."
        )
    return Dense(layer, kernel, bias, turned)


def numbered(layers: Sequence[Dense] | Sequence[Norm]) -> bool:
    """Whether the names differ only in their numbers."""
    return len({re.sub(r"[._]?\d+", "", layer.name) for layer in layers}) <= 1


def _natural(name: str) -> list[str | int]:
    """A sort key that orders `10` after `2`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


# ---- Keras's files ----


def _keras_archive(file: str, content: bytes) -> Weights:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            config = json.loads(archive.read("config.json"))
            stored = archive.read("model.weights.h5")
    except (zipfile.BadZipFile, KeyError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise WeightFileError(f"{file}: expected a whole .keras file of Keras 3: {error}.") from None
    return _of_groups(file, _groups(file, stored), _layers(file, config))


def _groups(file: str, content: bytes) -> dict[str, list[NDArray[Any]]]:
    """The arrays of each layer of a Keras HDF5 file, by the name of its group."""
    try:
        import h5py
    except ImportError:
        raise WeightFileError(
            f"{file}: Keras's files need h5py, which is not installed: pip install 'bnlayer[keras-files]'. Or, where "
            "Keras is: numpy.savez('weights.npz', **{v.path: v.numpy() for v in model.weights})."
        ) from None
    groups: dict[str, list[NDArray[Any]]] = {}

    def visit(path: str, entry: Any) -> None:
        group, _, number = path.rpartition("/vars/")
        if number.isdecimal() and isinstance(entry, h5py.Dataset) and _kind(group) is not None:
            groups.setdefault(group, []).append(np.asarray(entry))

    try:
        with h5py.File(io.BytesIO(content), "r") as stored:
            stored.visititems(visit)  # by name, so that the arrays of a layer come in their order
    except OSError as error:
        raise WeightFileError(f"{file}: expected a whole HDF5 file of Keras 3: {error}.") from None
    if not groups:
        raise WeightFileError(
            f"{file}: holds no Dense layers as Keras 3 writes them: save with Keras 3, model.save('model.keras')."
        )
    return groups


def _kind(group: str) -> str | None:
    """The class of a layer: Keras names groups after classes, and numbers them in the model's order."""
    name = re.sub(r"_\d+$", "", group.rpartition("/")[2])
    return name if name in (_DENSE, _NORM) and not group.startswith("optimizer") else None


def _of_groups(
    file: str, groups: Mapping[str, list[NDArray[Any]]], configs: Mapping[str, list[Mapping[str, Any]]] | None
) -> Weights:
    dense: list[Dense] = []
    norms: list[Norm] = []
    for group in sorted(groups, key=_natural):
        arrays, layer = groups[group], group.removeprefix("layers/")
        if _kind(group) == _DENSE:
            dense.append(_dense(file, layer, dict(zip(("kernel", "bias"), arrays, strict=False))))
            continue
        names = _VECTORS.get(len(arrays))
        if configs is not None:
            config = configs[_NORM][len(norms)] if len(norms) < len(configs[_NORM]) else {}
            left_out = [name for name, flag in (("gamma", "scale"), ("beta", "center")) if not config.get(flag, True)]
            names = tuple(name for name in _VECTORS[4] if name not in left_out)
        if names is None:
            raise WeightFileError(
                f"{file}: layer {layer!r} has {len(arrays)} vectors, so that nobody can tell gamma from beta: save the "
                "whole model, model.save('model.keras')."
            )
        norms.append(_norm(file, layer, dict(zip(names, arrays, strict=False))))
    epsilons = {float(config["epsilon"]) for config in (configs or {}).get(_NORM, [])}
    if len(epsilons) > 1:
        raise WeightFileError(
            f"{file}: its normalizations have the epsilons {', '.join(map(str, sorted(epsilons)))}; this model has one."
        )
    return Weights(file, tuple(dense), tuple(norms), ordered=True, epsilon=next(iter(epsilons), None))


def _layers(file: str, config: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The configurations of the Dense layers and normalizations of a model with the supported structure.

    Raises:
        WeightFileError: the model computes something else.
    """
    try:
        listed = [(layer["class_name"], layer["config"]) for layer in config["config"]["layers"]]
    except (KeyError, TypeError):
        raise WeightFileError(
            f"{file}: expected a Sequential or functional model of Keras, received {config.get('class_name')!r}."
        ) from None
    made = [step for kind, layer in listed for step in _steps(kind, layer)]
    expected = ["Dense", "BatchNormalization", "relu"] * made.count("BatchNormalization") + ["Dense"]
    if made not in (expected, [*expected, "softmax"]):
        raise WeightFileError(
            f"{file}: expected [Dense, BatchNormalization, ReLU] for each hidden layer, then Dense, which is what "
            f"`bnlayer train` trains; received {', '.join(made)}."
        )
    return {
        _DENSE: [layer for kind, layer in listed if kind == "Dense"],
        _NORM: [layer for kind, layer in listed if kind == "BatchNormalization"],
    }


def _steps(kind: str, layer: Mapping[str, Any]) -> Iterable[str]:
    """What a Keras layer computes in inference mode, in words."""
    if kind in ("InputLayer", "Dropout", "GaussianNoise", "GaussianDropout", "AlphaDropout"):
        return ()
    if kind == "ReLU":
        plain = (layer.get("max_value"), layer.get("negative_slope", 0), layer.get("threshold", 0)) == (None, 0, 0)
        return ("relu",) if plain else ("a ReLU with arguments",)
    if kind == "Softmax":
        return ("softmax",)
    activation = layer.get("activation")
    active = () if activation in (None, "linear") else (str(activation),)
    if kind == "Activation":
        return active
    return (kind, *active)
