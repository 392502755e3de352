"""How the kernels see a batch: (A, C, B), whatever its rank and axis."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.plain import plain_array

Mask = NDArray[np.bool_] | None

ALL_ROWS = slice(None)  # the piece that is all of a batch


@lru_cache(256)  # a network has few shapes: one that was seen takes a tenth of the microsecond that this does
def flat_shape(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """The (A, C, B) of a batch's shape."""
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])


class View(NamedTuple):
    """A batch as (A, C, B): the axes before the channels, the channels, the axes after them.

    A contiguous batch is not copied; another one is, once.

    Attributes:
        x: (A, C, B), of any float dtype.
        mask: True where a value counts; None for none. (A, 1, 1) for channels in the last axis; otherwise (A, C, M),
            each truth for B/M elements side by side.
        shape: the batch's own.
    """

    x: NDArray[Any]
    mask: Mask
    shape: tuple[int, ...]

    @property
    def passes(self) -> Any:
        """What passes over it, in place of `bnlayer.tiling`; None for none."""
        return None

    @classmethod
    def of(cls, x: NDArray[Any], axis: int, mask: ArrayLike | None) -> View:
        """The view of a batch and its mask.

        The mask is expanded on the LAST axis, as in Keras: with the channels elsewhere, it can differ per channel.

        Raises:
            ValueError: the mask has not one dimension less than the batch, or does not broadcast to it.
            TypeError: it is an array of a kind whose meaning would be lost.
        """
        shape = x.shape
        flat = flat_shape(shape, axis)
        if mask is None:
            return cls(x.reshape(flat), None, shape)
        m = plain_array(mask, "the mask")
        if m.ndim != x.ndim - 1:
            raise ValueError(
                "The mask provided should be one dimension less than the inputs. "
                f"Received: mask.shape={m.shape}, inputs.shape={shape}"
            )
        try:
            m = np.broadcast_to(m.astype(bool), shape[:-1])
        except ValueError as error:
            raise ValueError(
                f"The mask does not broadcast to the inputs. Received: mask.shape={m.shape}, inputs.shape={shape}"
            ) from error
        if axis == x.ndim - 1:
            return cls(x.reshape(flat), m.reshape(-1, 1, 1), shape)
        return cls(x.reshape(flat), m.reshape(flat[0], flat[1], prod(shape[axis + 1 : -1])), shape)

    def alike(self, array: NDArray[Any]) -> View:
        """Another array of the batch's shape, without a mask."""
        return type(self)(array.reshape(self.x.shape), None, self.shape)

    def restore(self, array: NDArray[Any]) -> NDArray[Any]:
        """An (A, C, B) array in the batch's own shape."""
        return array.reshape(self.shape)

    def is_ready(self, kind: np.dtype[Any]) -> bool:
        """Whether kernels of a dtype can take the batch as it is."""
        ready = self.x.dtype == kind
        return ready and (self.mask is None or self.mask.shape[2] == self.x.shape[2])

    def values(self, at: slice, kind: np.dtype[Any]) -> NDArray[Any]:
        """A piece of the batch along A, in a dtype; a view where it is of that dtype."""
        piece = self.x if at == ALL_ROWS else self.x[at]
        return piece if piece.dtype == kind else piece.astype(kind)

    def truths(self, at: slice) -> Mask:
        """The piece of the mask, of a form that broadcasts to that of the batch."""
        if self.mask is None or self.mask.shape[1] != self.x.shape[1] or self.mask.shape[2] in (0, self.x.shape[2]):
            return self.mask if self.mask is None else self.mask[at]
        return np.repeat(self.mask[at], self.x.shape[2] // self.mask.shape[2], axis=2)
