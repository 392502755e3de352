"""What a Keras layer shows of its variables, in Keras's names and order."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.plain import plain_array
from bnlayer.variable import Variable

_taken: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)


def automatic_name(stem: str) -> str:
    """Keras's name for the next unnamed layer of a kind: `stem`, `stem_1`, …; the same on every rank."""
    number = next(_taken[stem])
    return f"{stem}_{number}" if number else stem


@dataclass(eq=False, slots=True)
class Waiting:
    """What waits for `backward`.

    Attributes:
        calls: those in training mode since the last one.
        saved: of the one call that waits; None: none does, or several do.
    """

    calls: int = 0
    saved: Any = None


class Layer:
    """A layer's name, its variables and their penalties.

    Attributes:
        name: unique among the live synchronized layers of a process.
        trainable: False freezes it.
    """

    def __init__(self, name: str, trainable: bool) -> None:
        self.name = name
        self.trainable = trainable
        self._variables: list[Variable] = []
        self._waiting = Waiting()
        self._weights_set = False  # since the ranks last compared them

    @property
    def weights(self) -> list[Variable]:
        """All variables: trainable ones, then moving ones."""
        return list(self._variables)

    @property
    def trainable_weights(self) -> list[Variable]:
        """What an optimizer updates; none when frozen."""
        return [v for v in self._variables if v.trainable and self.trainable]

    @property
    def non_trainable_weights(self) -> list[Variable]:
        """What it doesn't; all of them when frozen."""
        return [v for v in self._variables if not (v.trainable and self.trainable)]

    variables = weights
    trainable_variables = trainable_weights
    non_trainable_variables = non_trainable_weights

    def get_weights(self) -> list[NDArray[Any]]:
        """Copies of all values, in the order of `weights`."""
        return [v.numpy() for v in self._variables]

    def set_weights(self, values: Sequence[ArrayLike]) -> None:
        """Assign all values, in the order of `weights`; nothing is assigned if one does not fit.

        For a synchronized layer it is like a training call: every rank makes it, and alike.

        Raises:
            ValueError: their number or a shape differs.
            TypeError: one is an array of a kind whose meaning would be lost.
        """
        arrays = [plain_array(value, f"weight {number}") for number, value in enumerate(values)]
        names = ", ".join(f"{v.name}{v.shape}" for v in self._variables)
        shapes = [array.shape for array in arrays]
        if shapes != [v.shape for v in self._variables]:
            raise ValueError(
                f"Layer {self.name!r}: expected {len(self._variables)} weights ({names or 'it is not built yet'}), "
                f"received {len(shapes)} of shapes {shapes}."
            )
        for variable, array in zip(self._variables, arrays, strict=True):
            variable.assign(array)
        self._weights_set = True

    @property
    def losses(self) -> list[float]:
        """One penalty per trainable weight that has a regularizer."""
        return [v.regularizer(v.value) for v in self.trainable_weights if v.regularizer is not None]

    def regularizer_gradients(self) -> list[NDArray[Any]]:
        """The penalties' gradients, one per entry of `trainable_weights`; zeros where there is no regularizer.

        `backward` leaves them out: a trainer adds them once per step, after the reduction, not once per rank.

        Raises:
            ValueError: a regularizer has no derivative.
        """
        return [
            np.zeros_like(v.value) if v.regularizer is None else v.regularizer.gradient(v.value)
            for v in self.trainable_weights
        ]
