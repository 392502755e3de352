"""Configurations, policies and error texts: Keras's both ways, or clearer ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest

from bnlayer import BatchNormalization
from bnlayer.dtypes import Policy
from support.configurations import Theirs, both_ways, unnamed
from support.conformance import CASES, POLICIES, Case

pytestmark = pytest.mark.keras


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_configurations_go_both_ways(case: Case) -> None:
    """Ours is Keras's, and each layer loads the other's."""
    both_ways(BatchNormalization(**case.arguments), Theirs(**case.arguments))


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_by_name_by_object_and_by_configuration(policy: str) -> None:
    """Keras's own policy objects are taken; the dtypes that follow are Keras's."""
    theirs = Theirs(dtype=policy)
    for given in (policy, keras.DTypePolicy(policy), theirs.get_config()["dtype"]):
        ours = BatchNormalization(dtype=given)
        both_ways(ours, theirs)
        assert (ours.dtype, ours.variable_dtype.name, ours.compute_dtype.name) == (
            theirs.dtype,
            theirs.variable_dtype,
            theirs.compute_dtype,
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_every_input_dtype_gives_keras_output_dtype(policy: str) -> None:
    """Integers, bools and every float; the values agree as far as the output's dtype tells."""
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int8, np.uint16, np.bool_):
        x = (np.arange(24).reshape(6, 4) % 7).astype(dtype)
        ours, theirs = BatchNormalization(dtype=policy), Theirs(dtype=policy)
        y, z = ours(x, training=True), np.asarray(theirs(x, training=True))
        assert y.dtype == z.dtype
        tolerance = max(_epsilon(y.dtype), 1e-6)
        assert y.astype(np.float64) == pytest.approx(z.astype(np.float64), abs=2 * tolerance)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_integers_are_not_rounded_to_halves_first(policy: str) -> None:
    """2049 is no float16 and 257 no bfloat16, but float32 has both: Keras autocasts floats alone."""
    x = np.array([[2049, 257], [2049, 257]])
    for given, mean in ((x, x[0]), (x.astype(np.float32), Policy.of(policy).received(x[0] * 1.0, "x"))):
        ours, theirs = BatchNormalization(dtype=policy, momentum=0.0), Theirs(dtype=policy, momentum=0.0)
        for layer in (ours, theirs):
            layer(given, training=True)
            assert np.asarray(layer.moving_mean).tolist() == mean.tolist()
    assert mean.tolist() != x[0].tolist()


def _epsilon(dtype: np.dtype[Any]) -> float:
    """The distance of 1 to its neighbour."""
    one = np.ones((), dtype)
    return float(np.nextafter(one, np.array(2, dtype)) - one)


# ---- error texts ----

X = np.ones((4, 2), np.float32)


def spoilt(**arguments: Any) -> Callable[[Any], Any]:
    """Make a layer with these arguments."""
    return lambda cls: cls(**arguments)


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (spoilt(fused=True), "Unrecognized keyword arguments passed to BatchNormalization: {'fused': True}"),
        (
            spoilt(renorm=True, renorm_clipping={"rmax": 2, "min": 1}),
            (
                "Received invalid keys for `renorm_clipping` argument: {'rmax': 2, 'min': 1}. "
                "Supported values: ['rmax', 'rmin', 'dmax']."
            ),
        ),
        (
            lambda cls: cls(axis=3).compute_output_shape((4, 2)),
            "Axis 3 is out of bounds for input shape (4, 2). Received: axis=3",
        ),
        (
            lambda cls: cls(axis=-3).compute_output_shape((4, 2)),
            "Axis -3 is out of bounds for input shape (4, 2). Received: axis=-3",
        ),
        *(
            (
                lambda cls, training=training: cls()(X, training=training, mask=np.ones((4, 2))),
                (
                    "The mask provided should be one dimension less than the inputs. "
                    "Received: mask.shape=(4, 2), inputs.shape=(4, 2)"
                ),
            )
            for training in (True, False, None)
        ),
    ],
)
def test_error_texts_that_are_keras_own(act: Callable[[Any], Any], text: str) -> None:
    """Word for word; Keras adds what it was called with."""
    with pytest.raises(ValueError) as theirs:
        act(Theirs)
    with pytest.raises(ValueError) as ours:
        act(BatchNormalization)
    assert str(ours.value) == text
    assert text in str(theirs.value)


@pytest.mark.parametrize(
    ("clipping", "text", "keras_text"),
    [
        (
            {"rmax": 0.5, "rmin": 2},
            "rmax should be greater than rmin in the `renorm_clipping` argument. Received: rmax=0.5, rmin=2.",
            "Received: rmax={rmax}, rmin={rmin}.",
        ),
        (
            {"dmax": -1},
            "dmax should be non-negative in the `renorm_clipping` argument. Received: dmax=-1.",
            "Received: dmax={dmax}.",
        ),
    ],
)
def test_error_texts_where_keras_prints_its_own_source(clipping: dict[str, float], text: str, keras_text: str) -> None:
    """The same sentence with the numbers in it; Keras's lacks an f before a quote."""
    with pytest.raises(ValueError) as theirs:
        Theirs(renorm=True, renorm_clipping=clipping)
    with pytest.raises(ValueError) as ours:
        BatchNormalization(renorm=True, renorm_clipping=clipping)
    assert str(ours.value) == text
    assert str(theirs.value).endswith(keras_text)
    # Without renorm neither looks at the clipping, and both keep it.
    both_ways(BatchNormalization(renorm_clipping=clipping), Theirs(renorm_clipping=clipping))


@pytest.mark.parametrize(
    ("act", "keras_error", "keras_text", "text"),
    [
        (
            lambda cls: cls(axis=2)(X),
            IndexError,
            "tuple index out of range",
            "Axis 2 is out of bounds for input shape (4, 2). Received: axis=2",
        ),
        (
            lambda cls: cls().build((4, None)),
            ValueError,
            "Shapes used to initialize variables must be fully-defined",
            (
                "Axis -1 of the input must have a defined dimension, the number of channels. "
                "Received: input_shape=(4, None)"
            ),
        ),
        (
            lambda cls: _then(cls(name="bn"), X)(X[:, :1]),
            ValueError,
            "expected axis -1 of input shape to have value 2, but received input with shape (4, 1)",
            (
                "Input of layer 'bn' is incompatible with it: expected ndim=2 and 2 channels on axis -1, "
                "received shape (4, 1): ndim=2 and 1 channels."
            ),
        ),
        (
            lambda cls: _then(cls(name="bn"), X)(X[None]),
            ValueError,
            "expected ndim=2, found ndim=3",
            (
                "Input of layer 'bn' is incompatible with it: expected ndim=2 and 2 channels on axis -1, "
                "received shape (1, 4, 2): ndim=3 and 2 channels."
            ),
        ),
        (
            lambda cls: _then(cls(name="bn"), X).set_weights([np.ones((1, 2))]),
            ValueError,
            "with a weight list of length 1, but the layer was expecting 4 weights",
            (
                "Layer 'bn': expected 4 weights (gamma(2,), beta(2,), moving_mean(2,), moving_variance(2,)), "
                "received 1 of shapes [(1, 2)]."
            ),
        ),
        (
            spoilt(gamma_initializer="eye"),
            ValueError,
            "Could not interpret initializer identifier",
            "Unknown initializer: 'eye'.",
        ),
        (
            spoilt(gamma_regularizer="l3"),
            ValueError,
            "Could not interpret regularizer identifier",
            "Unknown regularizer: 'l3'.",
        ),
        (
            spoilt(gamma_constraint="tight"),
            ValueError,
            "Could not interpret constraint identifier",
            "Unknown constraint: 'tight'.",
        ),
    ],
)
def test_error_texts_compared_with_keras(
    act: Callable[[Any], Any], keras_error: type[Exception], keras_text: str, text: str
) -> None:
    """Where Keras's text is another, ours is a ValueError that names both sides."""
    with pytest.raises(keras_error) as theirs:
        act(Theirs)
    with pytest.raises(ValueError) as ours:
        act(BatchNormalization)
    assert keras_text in str(theirs.value)
    assert str(ours.value).startswith(text)


def _then(layer: Any, x: Any) -> Any:
    layer(x)
    return layer


# ---- where we differ on purpose ----


def test_one_channel_with_a_mask_works_here() -> None:
    """Keras squeezes its statistics to no dimension at all, and fails."""
    x, mask = np.array([[1.0], [2.0], [9.0]], np.float32), np.array([True, True, False])
    with pytest.raises(Exception, match="tuple index out of range"):
        Theirs()(x, training=True, mask=mask)
    ours = BatchNormalization(momentum=0.0)
    ours(x, training=True, mask=mask)
    assert ours.moving_mean.value == pytest.approx([1.5])
    assert ours.moving_variance.value == pytest.approx([0.25])


def test_zero_rows_destroy_keras_statistics_and_leave_ours() -> None:
    """A last batch without rows."""
    empty = np.zeros((0, 2), np.float32)
    ours, theirs = BatchNormalization(), Theirs()
    assert ours(empty, training=True).shape == (0, 2)
    assert [ours.moving_mean.value.tolist(), ours.moving_variance.value.tolist()] == [[0, 0], [1, 1]]
    with pytest.warns(RuntimeWarning), np.errstate(invalid="warn"):
        theirs(empty, training=True)
    assert np.isnan(np.asarray(theirs.moving_mean)).all()


def test_a_fully_masked_batch_is_keras_alone() -> None:
    """Mean and variance are 0 and the moving statistics decay; the output is β."""
    x, mask = np.full((3, 4, 2), 5.0, np.float32), np.zeros((3, 4), bool)
    ours, theirs = BatchNormalization(), Theirs()
    y, z = ours(x, training=True, mask=mask), np.asarray(theirs(x, training=True, mask=mask))
    assert y == pytest.approx(z, rel=1e-6)
    for variable, keras_variable in zip(ours.weights, theirs.weights, strict=True):
        assert variable.value == pytest.approx(np.asarray(keras_variable), rel=1e-7)


def test_synchronized_needs_keras_on_tensorflow() -> None:
    """Our configuration with synchronized=True is Keras's, but Keras takes it with one backend alone."""
    config = BatchNormalization(synchronized=True).get_config()
    with pytest.raises(TypeError, match="synchronized=True is only supported with the TensorFlow backend"):
        Theirs.from_config(config)
    assert unnamed({**config, "synchronized": False}) == unnamed(Theirs().get_config())


def test_float64_is_float64_here() -> None:
    """Keras computes a float64 layer in float32."""
    x = 1.0 + 1e-9 * np.random.default_rng(0).standard_normal((64, 2))
    ours, theirs = BatchNormalization(dtype="float64", epsilon=1e-20), Theirs(dtype="float64", epsilon=1e-20)
    with np.errstate(all="ignore"):
        keras_spread = np.asarray(theirs(x, training=True)).std()
    assert ours(x, training=True).std() == pytest.approx(1, abs=1e-2)
    assert keras_spread != pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("mask", [np.array([1.0, 0.0, 2.0]), np.array([1, 0, 3]), np.array([True])])
def test_masks_of_any_dtype_are_read_as_bool(mask: Any) -> None:
    """Also one that broadcasts over the rows."""
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    ours, theirs = BatchNormalization(), Theirs()
    assert ours(x, training=True, mask=mask) == pytest.approx(np.asarray(theirs(x, training=True, mask=mask)), abs=1e-6)
    assert ours.moving_variance.value == pytest.approx(np.asarray(theirs.moving_variance), rel=1e-6)
