"""The values of a layer that are sent when all ranks take over rank 0's: `World.synchronize`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.collective import Collective, current
from bnlayer.state import LayerState


def checked(layers: object, world: Collective) -> list[BatchNormalization]:
    """The layers of a list, if a world can synchronize them.

    Raises:
        TypeError: it is no list of layers.
        ValueError: a layer is not built, is there twice, or belongs to another world.
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"synchronize(layers): expected a list, received {type(layers).__name__}; write [layer].")
    chosen: list[Any] = list(layers)
    strangers = [type(each).__name__ for each in chosen if not isinstance(each, BatchNormalization)]
    if strangers:
        raise TypeError(f"synchronize(layers): expected BatchNormalization layers, received {strangers[0]} too.")
    names = [layer.name for layer in chosen]
    for layer in chosen:
        layer.state  # noqa: B018 - raises where the layer is not built
        if names.count(layer.name) > 1:
            raise ValueError(f"synchronize(layers): layer {layer.name!r} is in the list twice.")
        if layer.synchronized and (layer.collective if layer.collective is not None else current()) is not world:
            raise ValueError(
                f"synchronize(layers): layer {layer.name!r} belongs to another world: call that world's synchronize, "
                "or make the layer without collective=."
            )
    return chosen


def described(layer: BatchNormalization) -> str:
    """What two layers must have in common for one to take the other's values."""
    weights = " and ".join(variable.name for variable in layer.weights if variable.trainable) or "no weights"
    kind = "synchronized" if layer.synchronized else "local"
    return f"{layer.name}: {layer.state.kind}, {weights}, {kind}"


def contents(layer: BatchNormalization) -> list[NDArray[Any]]:
    """All values of a layer that are sent, in a fixed order."""
    return [*(variable.value for variable in layer.weights), *layer.state.arrays().values()]


def taken(layer: BatchNormalization, values: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Assign to a layer the first of the values that `contents` listed; returns the others."""
    weights, names = len(layer.weights), tuple(layer.state.arrays())
    end = weights + len(names)
    layer.set_weights(values[:weights])
    state = dict(zip(names, values[weights:end], strict=True))
    layer.restore(LayerState.from_arrays(state, layer.dtype_policy.arithmetic))
    return values[end:]
