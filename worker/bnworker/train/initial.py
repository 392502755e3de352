"""Initial weights from a file: they are fitted to the model, or refused with the reason.

    [Dense ─ BatchNormalization ─ ReLU] × hidden ─ Dense

Layers are matched in their order. Where the file and the model have different weights, the model's are chosen so that
it computes the same function: a bias before a normalization is subtracted from its moving mean, because BN(x·W + b)
with the mean μ is BN(x·W) with the mean μ − b; a missing γ is 1, a missing β or last bias is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnlayer.dtypes import is_real
from bnworker.train.data import Dataset
from bnworker.train.settings import Settings
from bnworker.train.weight_files import Dense, Norm, WeightFileError, Weights, numbered, read
from bnworker.world import World

_Layer = TypeVar("_Layer", Dense, Norm)


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a perceptron's layers.

    Attributes:
        features, hidden, classes: as of `Perceptron`.
        epsilon: of its normalizations.
    """

    features: int
    hidden: tuple[int, ...]
    classes: int
    epsilon: float

    @classmethod
    def of(cls, settings: Settings, data: Dataset) -> Sizes:
        """The sizes of a run's model."""
        return cls(data.features, settings.hidden, data.classes, settings.epsilon)

    @property
    def kernels(self) -> list[tuple[int, int]]:
        """The shapes of the Dense layers' kernels."""
        return list(pairwise((self.features, *self.hidden, self.classes)))

    def names(self) -> list[str]:
        """The names of all weights and moving statistics."""
        norms = ("gamma", "beta", "moving_mean", "moving_variance")
        return [
            *(f"dense_{number}/kernel" for number in range(1, len(self.hidden) + 2)),
            f"dense_{len(self.hidden) + 1}/bias",
            *(f"bn_{number}/{name}" for number in range(1, len(self.hidden) + 1) for name in norms),
        ]


@dataclass(frozen=True, eq=False)
class Initial:
    """The initial weights of a run.

    Attributes:
        tensors: by the names of `Sizes.names()`.
        text: says which layer of the file each layer was taken from.
    """

    tensors: dict[str, NDArray[Any]]
    text: str


def fitted(weights: Weights, sizes: Sizes) -> Initial:
    """Fit the weights of a file to a model.

    Raises:
        WeightFileError: they do not fit; the text names the layer, and the shapes.
    """
    dense = _in_order(weights, weights.dense, sizes.kernels, "Dense layers", sizes)
    norms = _in_order(weights, weights.norms, [(size,) for size in sizes.hidden], "batch normalizations", sizes)
    if weights.epsilon is not None and norms and weights.epsilon != sizes.epsilon:
        raise WeightFileError(
            f"{weights.file}: its normalizations have epsilon {weights.epsilon}, and --epsilon is {sizes.epsilon}, "
            f"with which the same weights compute something else. Give --epsilon {weights.epsilon}."
        )
    tensors: dict[str, NDArray[Any]] = {}
    for number, layer in enumerate(dense, 1):
        tensors[f"dense_{number}/kernel"] = _finite(weights, layer.name, "kernel", layer.kernel)
    last = dense[-1]
    bias = np.zeros(sizes.classes, last.kernel.dtype) if last.bias is None else last.bias
    tensors[f"dense_{len(dense)}/bias"] = _finite(weights, last.name, "bias", bias)
    for number, (layer, norm) in enumerate(zip(dense, norms, strict=False), 1):
        mean = norm.mean if layer.bias is None else norm.mean.astype(np.float64) - layer.bias.astype(np.float64)
        made = {
            "gamma": np.ones_like(norm.mean) if norm.gamma is None else norm.gamma,
            "beta": np.zeros_like(norm.mean) if norm.beta is None else norm.beta,
            "moving_mean": mean,
            "moving_variance": norm.variance,
        }
        tensors |= {f"bn_{number}/{name}": _finite(weights, norm.name, name, vector) for name, vector in made.items()}
        if (norm.variance < 0).any():
            raise WeightFileError(f"{weights.file}: layer {norm.name!r}: a moving variance is below 0.")
    origins = {f"dense_{number}": layer.name for number, layer in enumerate(dense, 1)}
    origins |= {f"bn_{number}": norm.name for number, norm in enumerate(norms, 1)}
    text = ", ".join(f"{ours} from {theirs}" for ours, theirs in origins.items())
    unsaid = f"; it does not say epsilon: {sizes.epsilon}" if weights.epsilon is None and norms else ""
    return Initial({name: tensors[name] for name in sizes.names()}, f"weights of {weights.file}: {text}{unsaid}")


def read_by_first(world: World, path: Path, sizes: Sizes) -> Initial:
    """Have rank 0 read and fit a file, and broadcast the result. Every rank calls it.

    Raises:
        WeightFileError: on every rank, with the same text.
        CollectiveError: another rank is lost.
    """
    parts: list[NDArray[Any]] = []
    if world.rank == 0:
        try:
            initial = fitted(read(path), sizes)
            parts = [_bytes(initial.text), *(np.ascontiguousarray(tensor) for tensor in initial.tensors.values())]
        except WeightFileError as error:
            parts = [_bytes(str(error))]
    text, *tensors = world.broadcast(parts)
    said = text.tobytes().decode()
    if not tensors:
        raise WeightFileError(said)
    return Initial(dict(zip(sizes.names(), tensors, strict=True)), said)


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)


def _in_order(
    weights: Weights, layers: Sequence[_Layer], shapes: Sequence[tuple[int, ...]], kind: str, sizes: Sizes
) -> Sequence[_Layer]:
    """The layers of a file in the model's order.

    Raises:
        WeightFileError: their number or a shape differs, or their order can't be determined.
    """
    received = [_shape(layer) for layer in layers]
    if received != list(shapes):
        if sorted(received) == sorted(shapes) and len(set(shapes)) == len(shapes):
            return [layers[received.index(shape)] for shape in shapes]
        raise WeightFileError(_mismatch(weights, layers, shapes, kind, sizes))
    if not (weights.ordered or numbered(layers)) and len(set(shapes)) < len(shapes):
        raise WeightFileError(
            f"{weights.file}: nobody can tell the order of its {kind} {', '.join(layer.name for layer in layers)}: "
            "some have the same shape, and safetensors keeps no order. Number their names, or save as .npz, in the "
            "order of the model: numpy.savez('weights.npz', **{k: v.numpy() for k, v in model.state_dict().items()})."
        )
    return layers


def _mismatch(
    weights: Weights, layers: Sequence[Dense | Norm], shapes: Sequence[tuple[int, ...]], kind: str, sizes: Sizes
) -> str:
    if len(layers) == len(shapes):
        layer, shape = next(
            (layer, shape) for layer, shape in zip(layers, shapes, strict=True) if _shape(layer) != shape
        )
        turned = isinstance(layer, Dense) and layer.turned
        expected, received = (tuple(reversed(of)) if turned else of for of in (shape, _shape(layer)))
        what = f"layer {layer.name!r}: expected shape {expected}, received {received}"
    else:
        held = ", ".join(f"{layer.name}{_shape(layer)}" for layer in layers) or "none"
        what = f"expected {len(shapes)} {kind}, received {len(layers)}: {held}"
    model = " → ".join(map(str, (sizes.features, *sizes.hidden, sizes.classes)))
    chain: list[tuple[int, ...]] = [layer.kernel.shape for layer in weights.dense]
    hint = ""
    if all(one[1] == other[0] for one, other in pairwise(chain)) and len(weights.norms) == len(chain) - 1:
        hint = f" The file's model is {' → '.join(map(str, (chain[0][0], *(shape[1] for shape in chain))))}."
    return f"{weights.file}: {what}; the model of --data and --hidden is {model}.{hint}"


def _shape(layer: Dense | Norm) -> tuple[int, ...]:
    return layer.kernel.shape if isinstance(layer, Dense) else layer.mean.shape


def _finite(weights: Weights, layer: str, name: str, array: NDArray[Any]) -> NDArray[Any]:
    what = f"{weights.file}: layer {layer!r}: expected {name} of finite floats, received"
    if not is_real(array.dtype) or array.dtype.kind in "iub":
        raise WeightFileError(f"{what} {array.dtype}.")
    if not np.isfinite(array.astype(np.float64)).all():
        raise WeightFileError(f"{what} values that are not finite.")
    return array
