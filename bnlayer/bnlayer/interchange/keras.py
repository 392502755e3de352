"""To and from Keras's layer: its weights in its order, renorm's three included. Keras is not imported.

The order is gamma (with `scale`), beta (with `center`), moving_mean, moving_variance, and with `renorm` moving_stddev,
renorm_mean, renorm_stddev. Both layers keep the biased variance and the same momentum, so training may go on on
either side.

Source: `keras.layers.BatchNormalization`, Keras 3.15.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.arguments import channel_axis, input_rank
from bnlayer.dtypes import is_real
from bnlayer.interchange.rank import build, rank_of
from bnlayer.layer import BatchNormalization
from bnlayer.plain import plain_array


class KerasLayer(Protocol):
    """What is used of a Keras layer."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""

    def get_weights(self) -> list[NDArray[Any]]:
        """The values; none before it is built."""

    def set_weights(self, weights: list[NDArray[Any]]) -> None:
        """Assign them."""


# What two layers must have in common to compute the same, now and in further training.
_COMMON = ("momentum", "epsilon", "center", "scale", "renorm", "renorm_clipping", "renorm_momentum")


def from_keras(
    source: KerasLayer | Sequence[ArrayLike], config: Mapping[str, Any] | None = None, *, ndim: int | None = None
) -> BatchNormalization:
    """The layer that a Keras layer is.

    Values are taken over exactly; they are rounded only where an array is wider than the configuration's variable
    dtype.

    Args:
        source: a Keras layer, or the arrays of its `get_weights()`, each (C,). None of them: a layer that is not built.
        config: of `get_config()`; None: `source`'s own.
        ndim: the rank of the inputs; None: what `source` was built for. Arrays alone don't know it, unless
            `config` is Keras 2's of a model's first layer.

    Returns:
        A new layer of the configuration's name and dtype policy.

    Raises:
        ValueError: `source` is neither; the configuration, the number, a shape or a dtype of the arrays does not fit;
            or `ndim` is missing.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        if config is None:
            raise ValueError("Arrays were given without config=, which says what they are: pass get_config()'s.")
        values = list(source)
    elif not (hasattr(source, "get_weights") and hasattr(source, "get_config")):
        raise ValueError(
            f"from_keras: expected a Keras layer, or the list of arrays of its get_weights() with config=, received a "
            f"{type(source).__name__}. Of a configuration alone, BatchNormalization.from_config(config) makes a layer."
        )
    else:
        values = list(source.get_weights())
        config = source.get_config() if config is None else config
        ndim = _rank_of(source) if ndim is None else ndim
    layer = BatchNormalization.from_config(config)
    ndim = input_rank(config) if ndim is None else ndim
    if not values:
        return layer
    arrays = [plain_array(value, f"weight {number}") for number, value in enumerate(values)]
    if any(array.shape != arrays[0].shape or array.ndim != 1 or not is_real(array.dtype) for array in arrays):
        received = ", ".join(f"{array.dtype}{array.shape}" for array in arrays)
        raise ValueError(f"Layer {layer.name!r}: expected real vectors of one length as weights, received {received}.")
    if ndim is None:
        raise ValueError(f"Layer {layer.name!r}: pass ndim=, the rank of its inputs: the source does not tell.")
    build(layer, arrays[0].shape[0], ndim)
    layer.set_weights(arrays)
    return layer


def to_keras(layer: BatchNormalization, target: KerasLayer) -> None:
    """Assign a layer's weights to a built Keras layer of the same configuration, all or nothing.

    A target of that configuration is `keras.layers.BatchNormalization.from_config(layer.get_config())`, built. Its
    variables round the values where they are narrower than the layer's. Grids don't travel.

    Args:
        layer: built.
        target: a Keras layer.

    Raises:
        ValueError: one of the two is not built, or they differ in what they compute.
    """
    if not layer.built:
        raise ValueError(f"Layer {layer.name!r} has no weights yet: call it once, or build(input_shape).")
    if not target.get_weights():
        raise ValueError(f"Layer {layer.name!r}: the Keras layer has no weights yet: call its build(input_shape).")
    expected, received = _facts(layer, rank_of(layer)), _facts(target, _rank_of(target))
    differing = [name for name in expected if expected[name] != received[name]]
    if differing:
        texts = (f"{name}={received[name]!r} where {expected[name]!r} is expected" for name in differing)
        raise ValueError(f"Layer {layer.name!r}: the Keras layer is another one: {'; '.join(texts)}.")
    target.set_weights(layer.get_weights())


def _facts(layer: BatchNormalization | KerasLayer, ndim: int | None) -> dict[str, Any]:
    config = layer.get_config()
    facts = {name: config.get(name) or None for name in _COMMON}  # Keras turns renorm_clipping=None into {}
    axis = channel_axis(config["axis"])
    facts["ndim"] = ndim
    facts["axis"] = axis % ndim if ndim else axis
    facts["shapes"] = [np.shape(value) for value in layer.get_weights()]
    return facts


def _rank_of(layer: object) -> int | None:
    """The rank that a Keras layer was built for."""
    ndim = getattr(getattr(layer, "input_spec", None), "ndim", None)
    return None if ndim is None else int(ndim)
