"""`Variable`: a named array with a gradient, by Keras's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bnlayer.plain import plain_array

if TYPE_CHECKING:
    from bnlayer.constraints import Constraint
    from bnlayer.regularizers import Regularizer


class Variable:
    """An array of the layer's state.

    Attributes:
        name: as Keras names it, e.g. "gamma".
        trainable: whether an optimizer may update it.
        gradient: of the latest backward pass, of the value's shape and dtype; None before one.
        regularizer: its penalty; None for none.
        constraint: applied by the optimizer after each update; None for none.
    """

    def __init__(
        self,
        value: NDArray[Any],
        name: str,
        trainable: bool,
        regularizer: Regularizer | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self._value = value
        self.name = name
        self.trainable = trainable
        self.regularizer = regularizer
        self.constraint = constraint
        self.gradient: NDArray[Any] | None = None

    @property
    def value(self) -> NDArray[Any]:
        """The array itself. It is replaced, never written to, by the layer.

        Write through `assign`: a synchronized layer does not notice what is written into the array.
        """
        return self._value

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's shape."""
        return self._value.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The value's dtype."""
        return self._value.dtype

    def numpy(self) -> NDArray[Any]:
        """A copy of the value."""
        return self._value.copy()

    def assign(self, value: ArrayLike) -> None:
        """Replace the value, cast to the variable's dtype.

        Raises:
            ValueError: the shape differs.
            TypeError: the value is an array of a kind whose meaning would be lost.
        """
        array = np.array(plain_array(value, f"a value of variable {self.name!r}"), dtype=self.dtype)
        if array.shape != self.shape:
            raise ValueError(
                f"The shape of variable {self.name!r} is {self.shape}; received a value of shape {array.shape}."
            )
        self._value = array

    def take(self, value: NDArray[Any]) -> None:
        """Replace the value by an array of the same shape and dtype that no other code will write to."""
        self._value = value

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """The value, for `np.asarray`."""
        if dtype is not None and np.dtype(dtype) != self.dtype:
            if copy is False:
                raise ValueError(f"Converting {self.dtype} to {np.dtype(dtype)} needs a copy, and copy=False.")
            return self._value.astype(dtype)
        return self._value.copy() if copy else self._value

    def __repr__(self) -> str:
        return f"<Variable {self.name}, shape={self.shape}, dtype={self.dtype}>"
