"""Arrays that mean more than their numbers are refused by name, wherever a user's array comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization, interchange
from bnlayer.initializers import get as initializer
from bnlayer.plain import plain_array
from bnworker.train.data import from_arrays
from bnworker.transports.alone import AloneTransport
from bnworker.world import World

MASKED = np.ma.masked_equal(np.array([[1.0, 2.0], [5.0, 6.0], [-9999.0, -9999.0]]), -9999.0)
X = np.array([[1.0, 2.0], [5.0, 6.0], [3.0, 4.0]])


class Quantity(np.ndarray[Any, Any]):
    """An array with a unit, as astropy's and unyt's."""

    def __array_ufunc__(self, *arguments: Any, **options: Any) -> Any:
        """Units are multiplied, too."""
        raise NotImplementedError


class Pint:
    """Numbers with a unit beside them; pint's answers NumPy with a warning, and its numbers."""

    units = property(lambda self: "metre")

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        """The numbers alone."""
        return np.ones((3, 2))


class Tensor:
    """A torch tensor that needs a gradient."""

    requires_grad = True


class Sparse:
    """A matrix of scipy.sparse."""

    nnz = property(lambda self: 3)

    def toarray(self) -> Any:
        """All numbers."""
        return np.ones((3, 2))


class Column:
    """A column of pandas with missing values."""

    dtype = "Float64"


Column.__module__ = "pandas.core.series"
TAKEN: list[Any] = [
    X,
    X.tolist(),
    tuple(X),
    X.view(np.matrix),
    X.view(type("Tagged", (np.ndarray,), {})),
    [[np.float32(1), 2]],
    BatchNormalization.from_config({"name": "bn"}).dtype_policy.received(X, "x"),
]


@pytest.fixture
def layer() -> BatchNormalization:
    """A layer that has been built, and has a call that waits."""
    bn = BatchNormalization(name="bn")
    bn(X, training=True)
    return bn


@pytest.fixture
def world() -> Iterator[World]:
    """A world of one."""
    with World(AloneTransport(), install=False) as one:
        yield one


@pytest.mark.parametrize("value", TAKEN)
def test_plain_numbers_are_taken(value: Any) -> None:
    """Subclasses that calculate as an array does, lists, scalars: as `np.asarray` takes them."""
    got = plain_array(value, "inputs")
    assert type(got) is np.ndarray
    assert (got == np.asarray(value)).all()


def test_a_file_in_memory_is_taken(tmp_path: Path) -> None:
    """`np.memmap` and `np.load(mmap_mode=)`: the bits of the array."""
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert type(mapped) is np.memmap
    assert BatchNormalization()(mapped, training=True).tobytes() == BatchNormalization()(X, training=True).tobytes()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (MASKED, r"MaskedArray: its mask would be lost\. Pass its \.data, and the positions that count as mask=, "),
        (np.ma.array(X), "MaskedArray: its mask would be lost"),
        ([MASKED[0], MASKED[1]], "its mask would be lost"),
        (([1.0, 2.0], [np.ma.masked, 3.0]), "its mask would be lost"),
        (
            X.view(Quantity),
            r"test_plain\.Quantity: its unit, mask or other meaning would be lost\. .*x\.view\(np\.ndarray\)",
        ),
        (Pint(), r"test_plain\.Pint: its unit would be lost\. .*x\.magnitude"),
        (Tensor(), r"Tensor: torch would not know of its gradients\. Pass x\.detach\(\)"),
        (Sparse(), r"Sparse: it is sparse\. Pass x\.toarray\(\)"),
        (
            Column(),
            r"pandas\.core\.series\.Column: its missing values or categories would be lost\. Pass x\.to_numpy",
        ),
    ],
)
def test_what_means_more_than_its_numbers_is_refused(value: Any, text: str) -> None:
    """By what it is, not by what this batch of it holds: a mask of nothing is refused before one of something comes."""
    with pytest.raises(TypeError, match=f"^Expected inputs as a plain array, received a .*{text}"):
        plain_array(value, "inputs")


WAYS: dict[str, Callable[[BatchNormalization, World], object]] = {
    "inputs": lambda bn, world: bn(MASKED, training=True),
    "inputs in inference": lambda bn, world: bn(MASKED),
    "dy": lambda bn, world: bn.backward(MASKED),
    "the mask": lambda bn, world: bn(X, training=True, mask=np.ma.array([True, True, False])),
    "a value of variable 'gamma'": lambda bn, world: bn.weights[0].assign(MASKED[0]),
    "weight 3": lambda bn, world: bn.set_weights([*bn.get_weights()[:3], MASKED[0]]),
    "the value of initializer": lambda bn, world: initializer(lambda shape, dtype: MASKED[0])((2,), np.dtype("f4")),
    "array 1 of allreduce": lambda bn, world: world.allreduce([X, MASKED]),
    "array 0 of broadcast": lambda bn, world: world.broadcast([MASKED]),
    "weight 0": lambda bn, world: interchange.from_keras([MASKED[0]] * 4, config=bn.get_config(), ndim=2),
    "an entry of a state dict": lambda bn, world: interchange.from_torch(
        {"running_mean": MASKED[0], "running_var": MASKED[1]}, ndim=2
    ),
    "the kernel": lambda bn, world: interchange.fold_following(bn, MASKED),
    "x": lambda bn, world: from_arrays("name", MASKED, np.zeros(3, np.int64)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in(layer: BatchNormalization, world: World, way: str) -> None:
    """Nothing is changed by what was refused, and what was waiting still waits."""
    before = [value.tobytes() for value in layer.get_weights()]
    with pytest.raises(TypeError, match=rf"^Expected {way.removesuffix(' in inference')}.* as a plain array, received"):
        WAYS[way](layer, world)
    assert [value.tobytes() for value in layer.get_weights()] == before
    assert layer.backward(np.zeros_like(X)).shape == X.shape
