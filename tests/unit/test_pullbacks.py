"""Handles of calls: what they keep and for how long, what they write to, and inputs that were changed in between."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import BatchNormalization, calibrating
from support.layers import gradients

Array = NDArray[np.float32]


def batch(seed: int, shape: tuple[int, ...] = (6, 3)) -> Array:
    """Normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def backward_of(x: Array, dy: Array) -> tuple[bytes, ...]:
    """What a layer that sees nothing else gives for one call."""
    bn = BatchNormalization()
    bn(x, training=True)
    return tuple(array.tobytes() for array in (bn.backward(dy), *gradients(bn)))


def test_the_code_of_the_page_runs() -> None:
    """Every block of docs/backward.md, in one namespace."""
    page = Path(__file__).parents[2] / "docs" / "backward.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


def test_backward_of_one_of_several_calls_is_refused() -> None:
    """It would be another call's gradient, without a word where the shapes agree; the layer is ready for the next."""
    bn, x = BatchNormalization(name="bn"), batch(0)
    for calls in (2, 3):
        for seed in range(calls):
            bn(batch(seed), training=True)
        with pytest.raises(RuntimeError) as caught:
            bn.backward(batch(9))
        assert str(caught.value) == (
            f"Layer 'bn': backward() belongs to one training call, and there were {calls} since the last backward(): "
            "whose gradient this is can't be known. Take a handle for each call: "
            "y, pullback = layer.vjp(x, training=True); dx, dgamma, dbeta = pullback(dy)."
        )
        with pytest.raises(RuntimeError, match="there was none since the last backward"):
            bn.backward(batch(9))
    bn(x, training=True)
    assert np.isfinite(bn.backward(batch(9))).all()


def test_handles_and_backward_are_independent() -> None:
    """A handle returns and writes to no `.gradient`; a call without one keeps its backward; both have the same bits."""
    bn, a, b, da, db = BatchNormalization(), batch(0), batch(1), batch(2), batch(3)
    bn(a, training=True)
    _, pullback = bn.vjp(b, training=True)
    got = pullback(db)
    assert bn.gamma is not None
    assert bn.gamma.gradient is None
    assert tuple(array.tobytes() for array in got if array is not None) == backward_of(b, db)
    assert bn.backward(da).tobytes() == backward_of(a, da)[0]
    before = gradients(bn)
    second = pullback(2 * db)
    np.testing.assert_allclose(second[0], 2 * got[0], rtol=1e-6, err_msg="a handle may be used for another dy")
    assert all(one is other for one, other in zip(gradients(bn), before, strict=True))


def test_calls_for_statistics_alone_keep_no_batch() -> None:
    """However many: of several calls no batch is kept, of one its own, and a handle's as long as the handle lives."""
    bn = BatchNormalization()
    gc.disable()
    try:
        first = batch(0)
        references = [weakref.ref(first)]
        bn(first, training=True)
        del first
        assert references[0]() is not None
        for seed in range(1, 5):
            x = batch(seed)
            references.append(weakref.ref(x))
            bn(x, training=True)
            del x
        assert [ref() for ref in references] == [None] * 5
        x = batch(9)
        held = weakref.ref(x)
        _, pullback = bn.vjp(x, training=True)
        del x
        assert held() is not None
        del pullback
        assert held() is None, "a dropped handle leaves nothing behind, not even for the garbage collector"
        x = batch(9)
        held = weakref.ref(x)
        bn(x)
        del x
        assert held() is None, "inference needs no batch for its gradient"
    finally:
        gc.enable()


def test_calibration_leaves_nothing_for_backward() -> None:
    """Its calls are for statistics alone: the training that follows need not know of them."""
    bn, x, dy = BatchNormalization(), batch(0), batch(1)
    with calibrating([bn]):
        for seed in range(3):
            bn(batch(seed), training=True)
    with pytest.raises(RuntimeError, match="there was none"):
        bn.backward(dy)
    bn(x, training=True)
    assert np.isfinite(bn.backward(dy)).all()


def test_handles_in_inference_mode() -> None:
    """dx = γs·dy with the moving statistics, no gradient of gamma and beta; frozen layers likewise."""
    bn, x, dy = BatchNormalization(), batch(0), batch(1)
    bn.vjp(x, training=True)
    for frozen in (False, True):
        bn.trainable = not frozen
        y, pullback = bn.vjp(x, training=frozen)
        assert y.tobytes() == bn(x).tobytes()
        dx, dgamma, dbeta = pullback(dy)
        assert dx.tobytes() == bn.backward(dy).tobytes()
        assert (dgamma, dbeta) == (None, None)
        with pytest.raises(ValueError, match=r"expected dy of the output's shape \(6, 3\), received \(5, 3\)"):
            pullback(dy[:5])


def test_copies_take_no_call_along() -> None:
    """A copied layer has made no call; the original's is its own."""
    bn, x, dy = BatchNormalization(name="bn"), batch(0), batch(1)
    bn(x, training=True)
    with pytest.raises(RuntimeError, match="there was none"):
        copy.deepcopy(bn).backward(dy)
    assert bn.backward(dy).tobytes() == backward_of(x, dy)[0]


@pytest.mark.parametrize("shape", [(6, 3), (300, 64), (4, 8, 5, 3)])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("write", [lambda x: np.maximum(x, 0, out=x), lambda x: x.fill(1), lambda x: np.negative(x, x)])
def test_an_input_that_was_written_to_is_detected(
    shape: tuple[int, ...], strided: bool, write: Callable[[Array], object]
) -> None:
    """In place, as activations and reused buffers are: the backward pass would read another batch."""
    x = batch(0, (2 * shape[0], *shape[1:]))[::2] if strided else batch(0, shape)
    bn, dy = BatchNormalization(name="bn"), batch(1, shape)
    for get in (lambda: bn.vjp(x, training=True)[1], lambda: (bn(x, training=True), bn.backward)[1]):
        pullback = get()
        pristine = x.copy()
        write(x)
        if strided and len(shape) > 2:
            pullback(dy)  # such a batch was copied at the call
            continue
        with pytest.raises(RuntimeError) as caught:
            pullback(dy)
        assert str(caught.value) == (
            "Layer 'bn': the inputs were written to between their call and its backward pass, which reads them again. "
            "Give the call a copy, or write into another array."
        )
        x[...] = pristine
    y, pullback = bn.vjp(x, training=True)
    y[...] = 0  # the output is the caller's own
    pullback(dy)
