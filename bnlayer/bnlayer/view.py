"""How the kernels see a batch: (A, C, B), whatever its rank and axis."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class View:
    """A batch as (A, C, B): the axes before the channels, the channels, the axes after them.

    A contiguous batch is not copied; another one is, once.

    Attributes:
        x: (A, C, B).
        mask: broadcasts to x, True where a value counts; None for none.
        shape: the batch's own.
    """

    x: NDArray[Any]
    mask: NDArray[np.bool_] | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: NDArray[Any], axis: int, mask: ArrayLike | None) -> View:
        """The view of a batch and its mask.

        The mask is expanded on the LAST axis, as in Keras: with the channels elsewhere, it can differ per channel.

        Raises:
            ValueError: the mask has not one dimension less than the batch, or does not broadcast to it.
        """
        shape = x.shape
        flat = (prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :]))
        if mask is None:
            return cls(x.reshape(flat), None, shape)
        m = np.asarray(mask)
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
        return cls(x.reshape(flat), np.broadcast_to(m[..., None], shape).reshape(flat), shape)

    def alike(self, array: NDArray[Any]) -> NDArray[Any]:
        """Another array of the batch's shape, as (A, C, B)."""
        return array.reshape(self.x.shape)

    def restore(self, array: NDArray[Any]) -> NDArray[Any]:
        """An (A, C, B) array in the batch's own shape."""
        return array.reshape(self.shape)
