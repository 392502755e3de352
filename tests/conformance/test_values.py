"""Outputs, moving statistics and gradients: right by a float64 evaluation, and no further from it than Keras is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from support.conformance import BOUNDS, CASES, Case, assert_close, error, in_compute_dtype, weights_of
from support.textbook import correction, inferred, mask_rows, moments, moved, normalized, rows

pytestmark = pytest.mark.keras

# How far an output may lie from the truth where Keras happens to lie nearer: float32 arithmetic rounds x − mean, the
# scale, their product, the shift and the sum, each by at most 2^-24 of a term of about 1 + |y|. That is 2.5·2^-23;
# of 336 cases Keras is nearer in 44, the farthest of ours being 1.7·2^-23 off. float64 needs no allowance.
FLOOR = {"float32": 3 * 2.0**-23, "float64": 0.0}


def layers(case: Case) -> tuple[BatchNormalization, Any]:
    """Ours and Keras's, built alike, with the same weights."""
    ours = BatchNormalization(**case.arguments)
    theirs = keras.layers.BatchNormalization(**case.arguments)
    ours.build(case.shape)
    theirs.build(case.shape)
    for layer in (ours, theirs):
        layer.set_weights(case.weights(ours))
    return ours, theirs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_and_inference(case: Case) -> None:
    """One training call, one inference call, one of the frozen layer: values, dtypes, and Keras's distance."""
    ours, theirs = layers(case)
    x, _, mask = case.data
    seen = rows(case.axis, in_compute_dtype(case.policy, x))
    m, before, settings = mask_rows(case.axis, mask, case.shape), weights_of(ours), case.settings
    statistics = moments(np, seen, m)
    constants = correction(statistics, before, settings)
    want = normalized(np, seen, before.gamma, before.beta, m, constants, settings.epsilon)
    with np.errstate(invalid="ignore"):  # at a mean of 1e4 Keras's variance is E[x²] − E[x]², and may be negative
        keras_value = theirs(x, training=True, mask=mask)
    _compare(case, ours(x, training=True, mask=mask), keras_value, want, "output")
    new = moved(statistics, before, settings)
    for variable, keras_variable in zip(ours.weights, theirs.weights, strict=True):
        assert (variable.name, variable.shape) == (keras_variable.name, keras_variable.shape)
        assert variable.dtype.name == str(keras_variable.dtype)
        if variable.name in new:
            got = variable.value
            assert_close(got, new[variable.name], variable.name)
            if got.dtype.name in BOUNDS:
                # Computed in float64 and rounded once: half a unit in the last place, whatever Keras has.
                assert error(got, new[variable.name]) <= max(_distance(keras_variable, new[variable.name]), 2.0**-24)

    after = weights_of(ours)
    theirs.set_weights(ours.get_weights())
    want = inferred(seen, after, settings.epsilon)
    inference = ours(x, mask=mask)
    _compare(case, inference, theirs(x, mask=mask), want, "inference")
    ours.trainable = theirs.trainable = False
    assert ours(x, training=True, mask=mask).tobytes() == inference.tobytes()
    assert np.array_equal(np.asarray(theirs(x, training=True, mask=mask)), np.asarray(theirs(x, mask=mask)))
    assert [value.tobytes() for value in ours.get_weights()] == [value.tobytes() for value in theirs.get_weights()]


def _compare(case: Case, got: NDArray[Any], keras_value: Any, want_NC: NDArray[np.float64], what: str) -> None:
    keras_value = np.asarray(keras_value)
    assert got.shape == keras_value.shape == case.shape
    assert got.dtype == keras_value.dtype
    flat = np.moveaxis(got, case.axis, -1).reshape(want_NC.shape)
    assert_close(flat, want_NC, what)
    if got.dtype.name in BOUNDS:
        keras_error = _distance(rows(case.axis, keras_value), want_NC)
        assert error(flat, want_NC) <= max(keras_error, FLOOR[got.dtype.name]), f"{what}: Keras has {keras_error:.2e}"


def _distance(keras_value: Any, want: NDArray[np.float64]) -> float:
    """Keras's error; infinite where it has NaN."""
    worst = error(np.asarray(keras_value), want)
    return np.inf if np.isnan(worst) else worst


def _derivative(x: Any, gamma: Any, beta: Any, m: Any, constants: Any, epsilon: float, dy: Any) -> Any:
    """dx, dγ and dβ; r and d are arguments of their own, and so constants."""
    _, pull = jax.vjp(lambda x, gamma, beta: normalized(jnp, x, gamma, beta, m, constants, epsilon), x, gamma, beta)
    return pull(dy)


_compiled = jax.jit(_derivative)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: Case) -> None:
    """dx, dγ, dβ are JAX's derivatives of the textbook in float64, with r and d of renorm held fixed."""
    ours, _ = layers(case)
    x, dy, mask = case.data
    seen, m = rows(case.axis, in_compute_dtype(case.policy, x)), mask_rows(case.axis, mask, case.shape)
    before, settings = weights_of(ours), case.settings
    constants = correction(moments(np, seen, m), before, settings)
    given = rows(case.axis, in_compute_dtype(case.policy, dy))
    derivatives = _compiled(seen, before.gamma, before.beta, m, constants, settings.epsilon, given)
    wants = [np.asarray(derivative) for derivative in derivatives]
    ours(x, training=True, mask=mask)
    dx = ours.backward(dy)
    assert_close(np.moveaxis(dx, case.axis, -1).reshape(seen.shape), wants[0], "dx")
    for variable, want in ((ours.gamma, wants[1]), (ours.beta, wants[2])):
        if variable is not None:
            assert variable.gradient is not None
            assert_close(variable.gradient, want, f"gradient of {variable.name}")


def test_the_cases_cover_what_they_say() -> None:
    """Every axis of every rank with every policy, and enough of them."""
    assert len(CASES) >= 1000
    assert len({(len(case.shape), case.axis % len(case.shape), case.policy) for case in CASES}) == 14 * 6
    assert len({str(case) for case in CASES}) == len(CASES)
