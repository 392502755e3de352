"""The page for users of Keras says what is so: its code runs, in one go, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization

pytestmark = pytest.mark.keras

PAGE = Path(__file__).parents[2] / "docs" / "keras-differences.md"


def test_the_code_of_the_page_runs() -> None:
    """Every block, in one namespace; lines keep their numbers."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) == 4
    namespace: dict[str, Any] = {}
    for block in blocks:
        lines_before = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines_before + block[1], str(PAGE), "exec"), namespace)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_masked_value_that_is_not_finite_stays_where_it_is(bad: float) -> None:
    """Its own output is not finite, as in Keras; everything else is as without it."""
    import keras

    x, mask = np.arange(12.0, dtype=np.float32).reshape(6, 2), np.array([1, 1, 0, 1, 1, 1], bool)
    x[2, 0] = bad
    ours, theirs = BatchNormalization(), keras.layers.BatchNormalization()
    y, z = ours(x, training=True, mask=mask), np.asarray(theirs(x, training=True, mask=mask))
    assert np.isfinite(y).tolist() == np.isfinite(z).tolist()
    assert y[np.isfinite(y)] == pytest.approx(z[np.isfinite(z)], abs=1e-5)
    assert np.isfinite(ours.backward(np.ones_like(y))[mask]).all()


def test_a_nan_in_the_batch_is_keras_for_a_local_layer() -> None:
    """Output and moving statistics of its channel are NaN, the other channel's are as they would be."""
    import keras

    x = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    x[2, 0] = np.nan
    ours, theirs = BatchNormalization(), keras.layers.BatchNormalization()
    for got, want in ((ours(x, training=True), theirs(x, training=True)), (ours(x), theirs(x))):
        assert got == pytest.approx(np.asarray(want), abs=1e-5, nan_ok=True)
    for variable, keras_variable in zip(ours.weights, theirs.weights, strict=True):
        assert variable.value == pytest.approx(np.asarray(keras_variable), rel=1e-6, nan_ok=True)
