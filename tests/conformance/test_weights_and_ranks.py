"""Trained weights go from a Keras layer into ours and back, and several ranks do what one process does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from support.conformance import BOUNDS, CASES, POLICIES, Case, assert_close, in_compute_dtype, weights_of
from support.ranks import Meeting, SimulatedRank, run_all
from support.textbook import correction, inferred, mask_rows, moments, normalized, rows

pytestmark = pytest.mark.keras

PRODUCTS = [case for case in CASES if case.axis % len(case.shape) == len(case.shape) - 1][::5]
# Keras's own distance from the truth bounds how near two layers can be that both are right.
NEAR = {"float32": 5e-6, "float64": 5e-6, "float16": 5e-3, "bfloat16": 5e-2}


def trained(layer: Any, case: Case, steps: int = 3) -> Any:
    """The layer after some training calls on data of its own."""
    for step in range(steps):
        x, _, mask = case.data
        # Near 1: at a mean of 1e4 Keras's statistics are too far off to train on.
        layer(x % 3 + np.float32(step), training=True, mask=mask)
    return layer


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_trained_weights_round_trip(case: Case) -> None:
    """The same numbers both ways; the receiving layer then infers what the giving one does."""
    theirs = trained(keras.layers.BatchNormalization(**case.arguments), case)
    values = [np.asarray(variable) for variable in theirs.weights]
    ours = BatchNormalization(**case.arguments)
    ours.build(case.shape)
    ours.set_weights(values)
    _equal(ours.get_weights(), values)
    x = case.data[0] % 3
    _near(ours(x), theirs(x))

    mine = trained(ours, case)
    receiver = keras.layers.BatchNormalization.from_config(mine.get_config())
    receiver.build(case.shape)
    receiver.set_weights(mine.get_weights())
    _equal([np.asarray(variable) for variable in receiver.weights], mine.get_weights())
    _near(mine(x), receiver(x))
    # The receiver goes on training as the giver does, renorm's statistics included.
    _near(trained(mine, case, 1)(x), trained(receiver, case, 1)(x))


def test_weights_are_counted_as_keras_counts_them() -> None:
    """All, trainable, not trainable; before and after freezing, with and without renorm."""
    for renorm in (False, True):
        ours, theirs = BatchNormalization(renorm=renorm), keras.layers.BatchNormalization(renorm=renorm)
        for trainable in (True, False, True):
            counts = []
            for layer in (ours, theirs):
                if not layer.built:
                    layer.build((None, 3))
                layer.trainable = trainable
                groups = (layer.weights, layer.trainable_weights, layer.non_trainable_weights)
                counts.append([[variable.name for variable in group] for group in groups])
            assert counts[0] == counts[1]


def _equal(got: list[NDArray[Any]], want: list[NDArray[Any]]) -> None:
    """The same numbers. (A float64 variable of Keras's NumPy backend may hold float32 ones.)"""
    assert len(got) == len(want)
    assert all(np.array_equal(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(got, want, strict=True))


def _near(got: NDArray[Any], keras_value: Any) -> None:
    keras_value = np.asarray(keras_value)
    assert got.dtype == keras_value.dtype
    a, b = got.astype(np.float64), keras_value.astype(np.float64)
    assert float(np.max(np.abs(a - b) / (1 + np.abs(b)))) <= NEAR[got.dtype.name]


SYNCHRONIZED = [case for case in CASES if case.axis % len(case.shape) > 0][::4]


@pytest.mark.parametrize("case", SYNCHRONIZED, ids=str)
def test_several_ranks_are_one_process_and_one_process_is_right(case: Case) -> None:
    """Rows dealt out to 1, 2, 3 and 4 ranks, one of them without any: one process's bits, which are the truth's."""
    steps = [replace(case, number=case.number + step).data for step in range(3)]
    seen = _local(case, steps)
    n = case.shape[0]
    for cuts in ([], [n // 2], [n // 2, n // 2], [0, n // 3, n // 2]):
        meeting = Meeting(len(cuts) + 1, case.number)
        ranks = run_all(meeting, lambda rank, cuts=cuts: _rank(case, steps, rank, cuts))  # type: ignore[misc]  # bound
        for step, want in enumerate(seen):
            shards = [rank[step] for rank in ranks]
            joined = [np.concatenate([shard[i] for shard in shards]).tobytes() for i in (0, 1)]
            assert [joined, *(shard[2] for shard in shards)] == [want[:2], *[want[2]] * len(shards)]


def _local(case: Case, steps: list[Any]) -> list[Any]:
    """One process, checked against the textbook at each step; what the ranks must reproduce."""
    bn = BatchNormalization(**case.arguments, synchronized=True, name="bn")
    bn.build(case.shape)
    bn.set_weights(case.weights(bn))
    seen = []
    for x, dy, mask in steps:
        given, m = rows(case.axis, in_compute_dtype(case.policy, x)), mask_rows(case.axis, mask, case.shape)
        before, epsilon = weights_of(bn), case.settings.epsilon
        constants = correction(moments(np, given, m), before, case.settings)
        y = bn(x, training=True, mask=mask)
        want = normalized(np, given, before.gamma, before.beta, m, constants, epsilon)
        assert_close(np.moveaxis(y, case.axis, -1).reshape(want.shape), want, "output")
        dx = bn.backward(dy)
        seen.append([y.tobytes(), dx.tobytes(), _common(bn)])
        z = inferred(given, weights_of(bn), epsilon)
        assert_close(np.moveaxis(bn(x), case.axis, -1).reshape(want.shape), z, "inference")
    return seen


def _rank(case: Case, steps: list[Any], rank: SimulatedRank, cuts: list[int]) -> list[Any]:
    bn = BatchNormalization(**case.arguments, synchronized=True, name="bn", collective=rank)
    bn.build(case.shape)
    bn.set_weights(case.weights(bn))
    out = []
    for x, dy, mask in steps:
        shard, gradient = (np.split(a, cuts)[rank.rank] for a in (x, dy))
        own = None if mask is None else np.split(mask, cuts)[rank.rank]
        out.append([bn(shard, training=True, mask=own), bn.backward(gradient), _common(bn)])
    return out


def _common(bn: BatchNormalization) -> list[bytes]:
    """What all ranks must hold alike: weights, gradients, grids."""
    gradients = [v.gradient.tobytes() for v in bn.trainable_weights if v.gradient is not None]
    return [*gradients, *(array.tobytes() for array in (*bn.get_weights(), *bn.state.arrays().values()))]


def test_the_synchronized_cases_hold_what_matters() -> None:
    """Every policy, masks that count per channel, clipped renorm."""
    assert {case.policy for case in SYNCHRONIZED} == set(POLICIES) > set(BOUNDS)
    assert any(case.masked and case.axis % len(case.shape) < len(case.shape) - 1 for case in SYNCHRONIZED)
    assert {None if case.clipping is None else len(case.clipping) for case in SYNCHRONIZED} == {None, 0, 3}
