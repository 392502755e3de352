"""How many dimensions a layer's inputs have: `build` pins it, weights alone don't say it."""

from __future__ import annotations

from bnlayer.layer import BatchNormalization

HIGHEST = 64  # NumPy's arrays have no more dimensions


def rank_of(layer: BatchNormalization) -> int | None:
    """The rank of the inputs that a layer was built for; None where it is not built."""
    return layer.ndim if layer.built else None


def build(layer: BatchNormalization, channels: int, ndim: int) -> None:
    """Make a layer's variables for inputs of a rank.

    Raises:
        ValueError: there is no such rank, or the layer's axis lies outside it.
    """
    if not 1 <= ndim <= HIGHEST:
        raise ValueError(f"Expected a rank of the inputs between 1 and {HIGHEST}, received ndim={ndim}.")
    # build() reads the length and the channel dimension; the others may be anything.
    layer.build((channels,) * ndim)
