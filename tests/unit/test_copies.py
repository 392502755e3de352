"""Copies and pickles of a layer, also those that are made while another thread trains it."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

from bnlayer import BatchNormalization

_X = np.arange(12, dtype=np.float32).reshape(4, 3)
Copied = Callable[[Any], Any]


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


DETACHED = pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
ALL = pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, _pickled])
SETTINGS = pytest.mark.parametrize("settings", [{}, {"synchronized": True}, {"renorm": True}])


def _arrays(layer: BatchNormalization) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in layer.state.arrays().items()}


class Trains:
    """Something whose copy is made while the layer is trained once more, as by another thread."""

    def __init__(self, layer: BatchNormalization | None) -> None:
        self.layer = layer

    def __reduce__(self) -> tuple[type, tuple[None]]:
        if self.layer is not None:
            self.layer(_X, training=True)
        return Trains, (None,)


@DETACHED
@SETTINGS
def test_a_copy_made_while_a_layer_trains_is_of_one_moment(copied: Copied, settings: dict[str, Any]) -> None:
    """Its vectors are of the same call, and none of them looks as if it had been assigned to."""
    layer = BatchNormalization(**settings)
    layer(_X, training=True)
    layer.moving_mean.note = Trains(layer)  # type: ignore[attr-defined]  # after the mean, before the variance
    before = _arrays(layer)
    new = copied(layer)
    assert (layer.state.version, new.state.version) == (2, 1)
    assert _arrays(new) == before
    assert not new._state_set
    new.name = "the copy"  # beside the first, among synchronized layers
    new(_X, training=True)
    assert _arrays(new) == _arrays(layer)


class Shared(BatchNormalization):
    """A layer that is trained while a copy of it is made."""

    meanwhile: ClassVar[BatchNormalization | None] = None

    def __setstate__(self, given: Any) -> None:
        if Shared.meanwhile is not None:
            Shared.meanwhile(_X, training=True)
        super().__setstate__(given)


@SETTINGS
def test_a_shallow_copy_takes_nothing_from_the_layer(settings: dict[str, Any]) -> None:
    """They share their variables, to which the copy sets nothing."""
    layer, alike = Shared(**settings), BatchNormalization(**settings)
    layer(_X, training=True)
    Shared.meanwhile = layer
    try:
        new = copy.copy(layer)
    finally:
        Shared.meanwhile = None
    for _ in range(2):
        alike(_X, training=True)
    assert new.moving_mean is layer.moving_mean
    assert _arrays(layer) == _arrays(alike)
    assert not layer._state_set


class Slotted(BatchNormalization):
    """A subclass whose state is Python's pair, for its slots."""

    __slots__ = ("extra",)
    extra: int

    def __getstate__(self) -> Any:
        return super().__getstate__(), {"extra": self.extra}


class Plain(BatchNormalization):
    """A subclass that copies what it has."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None, "_driver": None}


class Own(BatchNormalization):
    """A subclass that sets its attributes itself."""

    def __setstate__(self, given: Any) -> None:
        self.__dict__.update(given)


class Around(BatchNormalization):
    """A subclass that makes no variables."""

    def build(self, input_shape: Any) -> None:
        """None."""
        self.built = True


@ALL
@pytest.mark.parametrize("kind", [BatchNormalization, Slotted, Plain, Own])
def test_a_copy_of_any_kind_of_layer_holds_its_values(copied: Copied, kind: type[BatchNormalization]) -> None:
    """What was assigned, too; and the copy's copy."""
    layer = kind()
    layer.extra = 5  # type: ignore[attr-defined]
    for _ in range(3):
        layer(_X, training=True)
    layer.moving_mean.assign(np.full(3, 7))
    new = copied(layer)
    again = copied(new)
    assert new.extra == again.extra == 5
    assert new.moving_mean in list(new.weights)
    expected = [value.tobytes() for value in layer.get_weights()]
    for each in (new, again):
        assert [value.tobytes() for value in each.get_weights()] == expected


@ALL
def test_a_copy_of_a_layer_without_variables(copied: Copied) -> None:
    """Not built yet, or without any of the layer's own."""
    assert not copied(BatchNormalization()).built
    around = Around()
    around.build((4, 3))
    assert copied(around).built


@ALL
def test_a_copy_is_as_fast_as_the_layer(copied: Copied) -> None:
    """The names of its attributes are those that Python compares by identity."""
    layer = BatchNormalization()
    layer(_X, training=True)
    assert all(sys.intern(name) is name for name in vars(copied(layer)))


@DETACHED
def test_a_copy_of_a_grid_has_its_fields_alone(copied: Copied) -> None:
    """What is computed from them may be computed by another thread while they are copied."""
    layer = BatchNormalization()
    layer(_X, training=True)
    layer.backward(_X)
    for grid in (layer.state.forward, layer.state.backward):
        grid.fingerprint  # noqa: B018
        new = copied(grid)
        assert vars(new).keys() == {"dtype", "is_probed", *(name for name in vars(grid) if name in _VECTORS)}
        assert new.fingerprint == grid.fingerprint


_VECTORS = ("pivot_C", "exponent_C", "gradient_C", "deviation_C")
