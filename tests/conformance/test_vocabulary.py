"""Initializers, regularizers and constraints: Keras's names, configurations, numbers and values."""

from __future__ import annotations

import itertools
from typing import Any

import keras
import numpy as np
import pytest

from bnlayer import BatchNormalization, constraints, initializers, regularizers
from bnlayer.dtypes import dtype_named
from support.configurations import Theirs, both_ways

pytestmark = pytest.mark.keras

INITIALIZERS: dict[str, dict[str, Any]] = {
    "Zeros": {},
    "Ones": {},
    "Constant": {"value": 0.25},
    "RandomNormal": {"mean": 1.0, "stddev": 0.5, "seed": 1},
    "TruncatedNormal": {"mean": 1.0, "stddev": 0.5, "seed": 2},
    "RandomUniform": {"minval": -1.0, "maxval": 3.0, "seed": 3},
    "VarianceScaling": {"scale": 2.0, "mode": "fan_out", "distribution": "untruncated_normal", "seed": 4},
    "GlorotUniform": {"seed": 5},
    "GlorotNormal": {"seed": 6},
    "HeUniform": {"seed": 7},
    "HeNormal": {"seed": 8},
    "LecunUniform": {"seed": 9},
    "LecunNormal": {"seed": 10},
}
REGULARIZERS: dict[str, dict[str, Any]] = {
    "L1": {"l1": 0.5},
    "L2": {"l2": 0.25},
    "L1L2": {"l1": 0.5, "l2": 0.125},
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "NonNeg": {},
    "MaxNorm": {"max_value": 1.5, "axis": 0},
    "UnitNorm": {"axis": 0},
    "MinMaxNorm": {"min_value": 3.0, "max_value": 4.0, "rate": 0.5, "axis": 0},
}
NAMES = {
    "initializers": ["zeros", "zero", "ones", "one", "random_normal", "normal", "truncated_normal",
                     "random_uniform", "uniform", "variance_scaling", "glorot_uniform", "glorot_normal", "he_uniform",
                     "he_normal", "lecun_uniform", "lecun_normal", *(INITIALIZERS.keys() - {"Constant"})],
    "regularizers": ["l1", "l2", "l1l2", *REGULARIZERS],
    "constraints": ["non_neg", "max_norm", "unit_norm", "min_max_norm", *CONSTRAINTS],
}  # fmt: skip
OURS = {"initializers": initializers, "regularizers": regularizers, "constraints": constraints}
CONFIGURATIONS = {"initializers": INITIALIZERS, "regularizers": REGULARIZERS, "constraints": CONSTRAINTS}
VOCABULARY = [
    (kind, name, config) for kind, configurations in CONFIGURATIONS.items() for name, config in configurations.items()
]


@pytest.mark.parametrize(("kind", "name", "config"), VOCABULARY)
def test_every_object_goes_both_ways(kind: str, name: str, config: dict[str, Any]) -> None:
    """As our instance, as Keras's, as a configuration; frozen and with a name of its own too."""
    ours = getattr(OURS[kind], name)(**config)
    theirs = getattr(getattr(keras, kind), name)(**config)
    targets = ["gamma", "beta"] + (["moving_mean", "moving_variance"] if kind == "initializers" else [])
    for target, trainable in itertools.product(targets, (True, False)):
        key = f"{target}_{kind[:-1]}"
        expected = Theirs(**{key: theirs}, name="bn", trainable=trainable)
        for given in (ours, theirs, expected.get_config()[key]):
            both_ways(BatchNormalization(**{key: given}, name="bn", trainable=trainable), expected)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_every_name_means_the_same(kind: str, name: str) -> None:
    """Keras's spellings, each the same class with the same defaults."""
    theirs = getattr(keras, kind).get(name)
    ours = OURS[kind].get(name)
    assert type(ours).__name__ == type(theirs).__name__
    assert ours is not None
    # Keras rounds L1's factor, alone, to float32.
    assert ours.get_config() == {
        key: 0.01 if key == "l1" and name.lower() == "l1" else value for key, value in theirs.get_config().items()
    }


@pytest.mark.parametrize(("name", "config"), INITIALIZERS.items())
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_initializers_draw_what_keras_draws(name: str, config: dict[str, Any], dtype: str) -> None:
    """Bit for bit on Keras's NumPy backend, from the same seed."""
    for size in (1, 7, 1000):
        ours = getattr(initializers, name)(**config)((size,), dtype_named(dtype))
        theirs = np.asarray(getattr(keras.initializers, name)(**config)((size,), dtype=dtype))
        assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_penalties_and_projections_are_keras(dtype: str) -> None:
    """`losses`, and each constraint's value."""
    w = np.random.default_rng(0).standard_normal(6).astype(dtype)
    for name, config in REGULARIZERS.items():
        ours = BatchNormalization(gamma_regularizer=getattr(regularizers, name)(**config), dtype=dtype)
        theirs = Theirs(gamma_regularizer=getattr(keras.regularizers, name)(**config), dtype=dtype)
        for layer in (ours, theirs):
            layer.build((None, 6))
            layer.set_weights([w, 0 * w, 0 * w, 0 * w])
        assert ours.losses == pytest.approx([float(loss) for loss in theirs.losses], rel=1e-6)
        ours.trainable = theirs.trainable = False
        assert ours.losses == theirs.losses == []
    for name, config in CONSTRAINTS.items():
        for value in (w, 10 * w, 0 * w):
            projected = getattr(constraints, name)(**config)(value)
            assert projected.dtype == value.dtype
            assert projected == pytest.approx(np.asarray(getattr(keras.constraints, name)(**config)(value)), rel=1e-6)


def test_names_that_only_we_take() -> None:
    """`constant` fails in Keras for want of a value, `l1_l2` is a function there and no name; ours are the defaults."""
    with pytest.raises(KeyError, match="value"):
        keras.initializers.get("constant")
    assert initializers.get("constant") == initializers.Constant(0.0)
    with pytest.raises(ValueError, match="Could not interpret regularizer identifier"):
        keras.regularizers.get("l1_l2")
    ours = regularizers.get("l1_l2")
    assert isinstance(ours, regularizers.L1L2)
    assert ours.get_config() == keras.regularizers.L1L2().get_config()
