"""Layers that files are made of, and what a file must keep of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnlayer import BatchNormalization

SUFFIXES = (".safetensors", ".npz")


def trained(name: str = "bn", channels: int = 3, ndim: int = 3, **arguments: Any) -> BatchNormalization:
    """A layer after two steps forward and back: every array of its state has been moved."""
    bn = BatchNormalization(name=name, **arguments)
    rng = np.random.default_rng(5)
    for _ in range(2):
        shape = (4,) * (ndim - 1) + (channels,)
        bn(rng.normal(3, 2, shape), training=True)
        bn.backward(rng.normal(0, 1, shape))
    return bn


def bits(bn: BatchNormalization) -> dict[str, tuple[str, bytes]]:
    """Everything a file must keep of a layer's values."""
    arrays = {**{v.name: v.value for v in bn.weights}, **bn.state.arrays()}
    return {name: (array.dtype.name, array.tobytes()) for name, array in arrays.items()}
