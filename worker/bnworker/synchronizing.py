"""The values of a layer that ranks take over from rank 0 or the owner: in `World.synchronize`, and on enrolment."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.collective import Collective, current
from bnlayer.state import LayerState

logger = logging.getLogger("bnworker")


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


def warn_of_replacement(layer: str, seeded: LayerState, *, known: bool) -> None:
    """Say that a layer's own statistics were replaced when it was enrolled.

    Args:
        layer: its name.
        seeded: what it got.
        known: whether the owner held them before; otherwise they are rank 0's.
    """
    if known:
        logger.warning(
            "layer %r goes on from the statistics that the service holds (version %d): an earlier run of this job "
            "left them, or a rank pushed them; for a fresh start give the job another name, or the layer: name=",
            layer,
            seeded.version,
        )
    else:
        logger.warning(
            "layer %r: this rank's moving statistics or grids were replaced by those of rank 0, which differ; all "
            "ranks begin from rank 0's",
            layer,
        )
