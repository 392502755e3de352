"""The weights of a checkpoint as other frameworks name and shape them.

| here and in Keras           | in torch                       |
|-----------------------------|--------------------------------|
| dense_1/kernel (in, out)    | dense_1.weight (out, in)       |
| dense_1/bias                | dense_1.bias                   |
| bn_1/gamma, bn_1/beta       | bn_1.weight, bn_1.bias         |
| bn_1/moving_mean            | bn_1.running_mean              |
| bn_1/moving_variance        | bn_1.running_var               |

The moving variance is the biased one, as in Keras; torch's running_var averages the unbiased one.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnworker.train.calibration import settings_of
from bnworker.train.checkpoint import Checkpoint
from bnworker.train.model import perceptron

_STATISTICS = ("moving_mean", "moving_variance")
_TORCH = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def weights(checkpoint: Checkpoint, names: str) -> dict[str, NDArray[Any]]:
    """Weights and moving statistics of the result of a run.

    Args:
        checkpoint: of the run.
        names: "keras" or "torch".
    """
    named: dict[str, NDArray[Any]] = {}
    for name, tensor in checkpoint.best_weights().items():
        layer, _, weight = name.partition("/")
        if weight.startswith("state/"):
            weight = weight.removeprefix("state/")
            if weight not in _STATISTICS:
                continue
        if names == "torch":
            turned = tensor.T if weight == "kernel" else tensor
            named[f"{layer}.{_TORCH[weight]}"] = np.ascontiguousarray(turned)
        else:
            named[f"{layer}/{weight}"] = tensor
    return named


def layers(checkpoint: Checkpoint) -> dict[str, BatchNormalization]:
    """The batch normalizations of the result of a run, by name, as `bnlayer.interchange.save` takes them.

    Raises:
        CheckpointError: it was written with settings that this version lacks.
    """
    model = perceptron(settings_of(checkpoint), checkpoint.data.features, checkpoint.data.classes)
    checkpoint.refuse_other_tensors(model.tensors(0))
    model.load(checkpoint.best_weights())
    return {norm.name: norm for norm in model.norms}


def encoded(checkpoint: Checkpoint, names: str, suffix: str) -> bytes:
    """The contents of a weight file.

    Args:
        checkpoint, names: see `weights`.
        suffix: ".npz" or ".safetensors".
    """
    from safetensors.numpy import save

    named = weights(checkpoint, names)
    if suffix == ".safetensors":
        return save(named, {"format": "pt"} if names == "torch" else None)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **named)
    return file.getvalue()
