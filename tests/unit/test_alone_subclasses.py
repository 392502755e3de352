"""Settings and variables that a subclass computes, and layers of a world of one that look them up."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.collective import Alone
from bnlayer.variable import Variable
from support.layers import ByExchange


def _bytes(layer: BatchNormalization) -> list[bytes]:
    return [array.tobytes() for array in layer.state.arrays().values()]


class Scheduled(BatchNormalization):
    """Its momentum falls with each call that reads it, and it may be frozen by a class of its own."""

    frozen = False

    @property
    def momentum(self) -> float:
        """Of the calls so far."""
        return 1.0 / (1 + self.state.version if self.built else 1)

    @momentum.setter
    def momentum(self, value: float) -> None:
        del value

    @property
    def trainable(self) -> bool:
        """As the class says."""
        return not type(self).frozen

    @trainable.setter
    def trainable(self, value: bool) -> None:
        del value


def test_settings_that_a_subclass_computes_are_read_at_each_call() -> None:
    """They change without being set."""
    layers = [Scheduled(synchronized=True, name="bn", collective=world) for world in (Alone(), ByExchange())]
    x = np.random.default_rng(0).normal(size=(5, 8, 3)).astype(np.float32)
    for batch in x:
        for layer in layers:
            layer(batch, training=True)
    assert _bytes(layers[0]) == _bytes(layers[1])
    Scheduled.frozen = True
    try:
        layers[0](x[0], training=True)
    finally:
        Scheduled.frozen = False
    assert layers[0].state.version == 5


class Halved(BatchNormalization):
    """Its momentum is kept under its own name, and read as another."""

    @property
    def momentum(self) -> float:
        """Less from call to call."""
        kept: float = self.__dict__["momentum"]
        return kept / (1 + self.state.version if self.built else 1)

    @momentum.setter
    def momentum(self, value: float) -> None:
        self.__dict__["momentum"] = value


def test_a_setting_that_is_kept_under_the_name_it_is_read_by() -> None:
    """What a property of the class makes of it counts."""
    layers = [Halved(synchronized=True, name="bn", collective=world) for world in (Alone(), ByExchange())]
    for batch in np.random.default_rng(0).normal(size=(5, 8, 3)).astype(np.float32):
        for layer in layers:
            layer(batch, training=True)
    assert _bytes(layers[0]) == _bytes(layers[1])


def test_a_setting_of_the_class_is_read_at_each_call() -> None:
    """`unbiased` is one of the class, until it is set on a layer."""
    seen = []
    for world in (Alone(), ByExchange()):

        class Kind(BatchNormalization):
            pass

        layer, x = Kind(synchronized=True, name="bn", collective=world), np.eye(3, dtype=np.float32)
        for step in range(6):
            Kind.unbiased = step >= 3
            layer(x, training=True)
        seen.append(layer.moving_variance.numpy().tobytes())
    assert seen[0] == seen[1]


def test_a_compute_dtype_that_a_subclass_computes() -> None:
    """It is the outputs', at every call."""

    class Wide(BatchNormalization):
        @property
        def compute_dtype(self) -> np.dtype[Any]:
            return np.dtype(np.float64)

    layer, x = Wide(), np.eye(3, dtype=np.float32)
    assert [layer(x, training=True).dtype.name for _ in range(4)] == ["float64"] * 4


def test_variables_of_a_subclass_give_and_take_their_values() -> None:
    """What a variable's value is, it says itself."""

    class Doubled(Variable):
        @property
        def value(self) -> NDArray[Any]:
            return self._value * 2

    seen = []
    for world in (Alone(), ByExchange()):
        layer, x = BatchNormalization(synchronized=True, name="bn", collective=world), np.eye(3, dtype=np.float32)
        layer(x, training=True)
        layer.gamma = Doubled(np.ones(3, np.float32), "gamma", True)
        seen.append([layer(x, training=True).tobytes() for _ in range(3)])
    assert seen[0] == seen[1]
