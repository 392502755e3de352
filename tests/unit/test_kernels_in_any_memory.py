"""The layer on batches that lie anyhow in memory: the bits of the reference, with every variant of the kernels.

Strides that are negative, zero or wider than the data, axes in any order, addresses that no vector is aligned to, masks
of any shape that Keras allows: what the kernels are handed, and what is copied for them first, must not be seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
from hypothesis import given, settings
from numpy.typing import NDArray

from bnlayer.kernels import choice, kernels
from bnlayer.kernels.compiled import variants
from bnlayer.layer import BatchNormalization

Array = NDArray[Any]
_DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16")} | {
    "bfloat16": np.dtype(ml_dtypes.bfloat16)
}


@dataclass(frozen=True)
class Memory:
    """How an array lies.

    Attributes:
        order: of the axes, from the one with the widest stride.
        steps: per axis: every so-manieth place of a larger array, from the end if negative.
        offset: bytes from where NumPy would begin: not even a multiple of the item's size.
        repeated: whether the first axis has stride 0.
    """

    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int
    repeated: bool

    def holding(self, values: Array) -> Array:
        """An array of these values, but for the repeated ones, that lies so."""
        if self.repeated:
            values = np.broadcast_to(values[:1], values.shape)
        room = [values.shape[axis] * abs(self.steps[axis]) for axis in self.order]
        count = int(np.prod(room))
        held = np.zeros(count * values.itemsize + self.offset + 1, np.uint8)
        wide = held[self.offset : self.offset + count * values.itemsize].view(values.dtype).reshape(room)
        there = wide.transpose(np.argsort(self.order))
        there = there[tuple(slice(None, None, step) for step in self.steps)]
        there[...] = values
        return np.broadcast_to(there[:1], there.shape) if self.repeated else there


@st.composite
def _memories(draw: st.DrawFn, axes: int) -> Memory:
    return Memory(
        tuple(draw(st.permutations(range(axes)))),
        tuple(draw(st.sampled_from([1, 1, 1, 2, -1, -2])) for _ in range(axes)),
        draw(st.integers(0, 65)),
        draw(st.sampled_from([False, False, False, True])),
    )


@dataclass(frozen=True)
class Batch:
    """A call and its gradient.

    Attributes:
        x, dy: as they lie in memory.
        mask: of some axes of x.
        axis: of the channels.
        dtype: the layer's.
        threads: how many pass over it.
    """

    x: Array
    dy: Array
    mask: Array | None
    axis: int
    dtype: str
    threads: int


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Any of them."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)))
    axis = draw(st.integers(1, len(shape) - 1))
    shape = (*shape[:axis], draw(st.integers(1, 70)), *shape[axis + 1 :])
    dtype = draw(st.sampled_from(sorted(_DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_cauchy((2, *shape)) * 2.0 ** draw(st.integers(-8, 4))
    if dtype == "float16":
        values = values.clip(-500, 500)  # beyond lies infinity: see `test_half_types`
    x, dy = (draw(_memories(len(shape))).holding(v.astype(_DTYPES[dtype])) for v in values)
    mask = None
    if draw(st.booleans()) and axis == len(shape) - 1:
        held = rng.random(shape[:-1]) < draw(st.sampled_from([0.1, 0.6, 1.0]))
        mask = draw(_memories(held.ndim)).holding(held)
    return Batch(x, dy, mask, axis, dtype, draw(st.sampled_from([1, 3])))


@contextmanager
def _kernels(name: str, threads: int) -> Iterator[None]:
    caches = kernels, choice.chosen, choice.threads
    with mock.patch.dict(os.environ, BNLAYER_KERNELS=name, BNLAYER_THREADS=str(threads)):
        for cached in caches:
            cached.cache_clear()
        yield
    for cached in caches:
        cached.cache_clear()


def _results(batch: Batch, name: str) -> list[Array]:
    """Two training calls with their backwards, the first of which looks for the grids, and an inference."""
    with _kernels(name, batch.threads if name != "reference" else 1):
        layer = BatchNormalization(axis=batch.axis, dtype=batch.dtype)
        layer(batch.x, training=True, mask=batch.mask)
        layer.backward(batch.dy)
        y = layer(batch.x, training=True, mask=batch.mask)
        dx = layer.backward(batch.dy)
        assert layer.gamma is not None and layer.beta is not None
        gradients = layer.gamma.gradient, layer.beta.gradient
        moving = layer.moving_mean.value, layer.moving_variance.value
        return [np.asarray(array) for array in (y, dx, *gradients, *moving, layer(batch.x))]


def _bits(array: Array) -> bytes:
    """But one NaN is as good as another."""
    return np.where(np.isnan(array), array.dtype.type(np.nan), array).astype(array.dtype).tobytes()


@settings(max_examples=150)
@given(batch=batches())
def test_the_same_bits_from_any_memory(batch: Batch) -> None:
    """Every variant, and the reference on the same values side by side in memory."""
    plain = Batch(
        batch.x.copy(), batch.dy.copy(), None if batch.mask is None else batch.mask.copy(), batch.axis, batch.dtype, 1
    )
    with np.errstate(all="ignore"):
        wanted = _results(plain, "reference")
        for name in variants():
            results = _results(batch, name)
            assert [v.shape for v in results] == [v.shape for v in wanted]
            assert [_bits(v) for v in results] == [_bits(v) for v in wanted], name
