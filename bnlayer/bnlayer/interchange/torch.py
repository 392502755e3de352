"""To and from the state dict of torch's `BatchNorm1d/2d/3d` and `SyncBatchNorm`. torch is not imported.

| torch | here |
|---|---|
| `weight`, `bias` | gamma, beta; absent with `affine=False`: `scale=False`, `center=False` |
| `running_mean`, `running_var` | moving_mean, moving_variance |
| `num_batches_tracked` | the state's version |
| `momentum`, `eps` (not in the state dict) | 1 − momentum, epsilon |

Values convert exactly, so inference is the same on both sides. Further training is not: torch moves `running_var`
towards the **unbiased** variance of a batch, Keras and this layer towards the biased one, and the two differ by the
factor N/(N − 1), N values a channel. A converted value stays what its origin made it.

Source: `torch.nn.modules.batchnorm`, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.arguments import number
from bnlayer.dtypes import dtype_named
from bnlayer.interchange.rank import build
from bnlayer.layer import BatchNormalization
from bnlayer.plain import plain_array

_VECTORS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
_COUNT = "num_batches_tracked"
_FLOATS = ("float32", "float64", "float16", "bfloat16")


def from_torch(
    state: Mapping[str, Any],
    *,
    ndim: int | None = None,
    prefix: str = "",
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    axis: int = 1,
    name: str | None = None,
    dtype: Any = None,
    synchronized: bool = False,
) -> BatchNormalization:
    """The layer that a module's state dict holds.

        moving statistics as they are        momentum = 1 − momentum_torch        epsilon = eps

    Args:
        state: name → tensor or array; entries outside `prefix` are not looked at.
        ndim: the rank of the inputs: 2 or 3 for `BatchNorm1d`, 4 for `BatchNorm2d`, 5 for `BatchNorm3d`. It must be
            given: the state dict does not hold it.
        prefix: what comes before the five names, its dot included, e.g. `"layer1.0.bn1."`.
        eps, momentum: the module's, in torch's convention: the state dict does not hold them. The defaults are torch's.
        axis: the channels' axis of the new layer's inputs; torch's is 1.
        name: of the new layer.
        dtype: its policy; None: the values' own dtype. A narrower one rounds them.
        synchronized: of the new layer.

    Returns:
        A new layer. Its version is `num_batches_tracked`, or 0 where that is missing, as torch reads it.

    Raises:
        ValueError: `state` is no state dict, `ndim` is missing, `momentum` is None, a name is missing or unknown, or
            shapes or dtypes do not fit.
    """
    if not isinstance(state, Mapping):
        raise ValueError(_no_state_dict(state))
    if ndim is None:
        raise ValueError(
            f"from_torch: prefix={prefix!r}: expected ndim=, the rank of the inputs, which a state dict does not hold: "
            "2 or 3 for BatchNorm1d, 4 for BatchNorm2d, 5 for BatchNorm3d."
        )
    if momentum is None:
        raise ValueError(
            "momentum=None is torch's cumulative average of all batches, which has no counterpart here: "
            "pass the momentum, in torch's convention, with which training should go on."
        )
    arrays = _arrays(state, prefix)
    vectors = {ours: arrays[torchs] for torchs, ours in _VECTORS.items() if torchs in arrays}
    if dtype is None:
        dtype = _common_dtype(vectors, prefix)
    layer = BatchNormalization(
        axis=axis,
        momentum=1.0 - number("momentum", momentum),
        epsilon=number("eps", eps),
        center="beta" in vectors,
        scale="gamma" in vectors,
        synchronized=synchronized,
        name=name,
        dtype=dtype,
    )
    build(layer, vectors["moving_mean"].shape[0], ndim)
    layer.set_weights(list(vectors.values()))
    version = int(arrays[_COUNT].item()) if _COUNT in arrays else 0
    layer.restore(replace(layer.state, version=version))
    return layer


def to_torch(layer: BatchNormalization, *, prefix: str = "") -> dict[str, NDArray[Any]]:
    """The state dict of the torch module that a layer is; `torch_arguments` are the module's.

        module = torch.nn.BatchNorm2d(**torch_arguments(layer))
        module.load_state_dict({key: torch.from_numpy(value) for key, value in to_torch(layer).items()})

    torch has `weight` and `bias` together: with one of `center` and `scale` alone, the other is filled in with
    weight = 1 or bias = 0, which torch would then train: that it was fixed is lost. The axis is not part of the state:
    torch's modules normalize axis 1.

    Args:
        layer: built, without renorm.
        prefix: put before each name, its dot included.

    Returns:
        New arrays of the variables' dtype; bfloat16 ones, which torch does not take from NumPy, widened to float32,
        from where `load_state_dict` brings them into a bfloat16 module without loss. `num_batches_tracked` is int64.

    Raises:
        ValueError: the layer is not built, or has renorm.
    """
    version = layer.state.version
    if layer.renorm:
        raise ValueError(
            f"Layer {layer.name!r}: torch has no counterpart of renorm. For inference alone, take the first weights, "
            "without renorm's three, into a layer with renorm=False."
        )
    values = {variable.name: variable.value for variable in layer.weights}
    if layer.center or layer.scale:
        values.setdefault("gamma", np.ones_like(layer.moving_mean.value))
        values.setdefault("beta", np.zeros_like(layer.moving_mean.value))
    kind = np.dtype(np.float32) if layer.dtype == "bfloat16" else layer.variable_dtype
    state = {prefix + torchs: values[ours].astype(kind) for torchs, ours in _VECTORS.items() if ours in values}
    return {**state, prefix + _COUNT: np.array(version, np.int64)}


def torch_arguments(layer: BatchNormalization) -> dict[str, Any]:
    """The keyword arguments of the torch module that a layer is.

    momentum is 1 − the layer's, rounded to float64: 0.99 becomes 0.010000000000000009.

    Raises:
        ValueError: the layer is not built.
    """
    return {
        "num_features": layer.state.channels,
        "eps": layer.epsilon,
        "momentum": 1.0 - layer.momentum,
        "affine": layer.center or layer.scale,
    }


def _arrays(state: Mapping[str, Any], prefix: str) -> dict[str, NDArray[Any]]:
    """The entries of one module, by torch's names, their names and shapes checked."""
    names = (*_VECTORS, _COUNT)
    tensors = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    missing = {"running_mean", "running_var"} - tensors.keys()
    if missing or tensors.keys() - set(names):
        modules = [repr(key.removesuffix("running_mean")) for key in state if key.endswith("running_mean")]
        raise ValueError(
            f"prefix={prefix!r}: expected {', '.join(names)}, received {', '.join(sorted(tensors)) or 'nothing'}. "
            f"The state dict has batch normalizations under: {', '.join(modules) or 'nothing'}. "
            "(One with track_running_stats=False has no running statistics, and no counterpart here.)"
        )
    arrays = {name: _array(value) for name, value in tensors.items()}
    shape = arrays["running_mean"].shape
    for name, array in arrays.items():
        if name == _COUNT and array.size == 1:
            continue  # () in torch; some writers of files make a vector of it
        expected = () if name == _COUNT else shape
        if array.shape != expected or len(shape) != 1:
            raise ValueError(
                f"{prefix + name!r}: expected shape {expected if len(shape) == 1 else '(channels,)'}, "
                f"received {array.shape}."
            )
    return arrays


def _no_state_dict(received: Any) -> str:
    kind = type(received).__name__
    if not hasattr(received, "state_dict"):
        return f"from_torch: expected the state dict of a module, received {received!r:.80}."
    return (
        f"from_torch: expected a state dict, received the module {kind}: pass its state_dict(), with its eps and "
        "momentum, which are not in there: from_torch(module.state_dict(), ndim=…, eps=module.eps, "
        "momentum=module.momentum)."
    )


def _array(value: Any) -> NDArray[Any]:
    """A tensor of any device, or an array, as an array."""
    if not hasattr(value, "detach"):
        return plain_array(value, "an entry of a state dict")
    tensor = value.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # which has no way to NumPy of its own
        return np.asarray(tensor.float().numpy()).astype(dtype_named("bfloat16"))
    return np.asarray(tensor.numpy())


def _common_dtype(vectors: Mapping[str, NDArray[Any]], prefix: str) -> str:
    names = {array.dtype.name for array in vectors.values()}
    if len(names) != 1 or not names <= set(_FLOATS):
        raise ValueError(
            f"prefix={prefix!r}: expected vectors of one dtype of {', '.join(_FLOATS)}, received "
            f"{', '.join(sorted(names))}. Pass dtype=, the policy of the new layer."
        )
    return names.pop()
