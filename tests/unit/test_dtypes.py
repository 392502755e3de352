"""Dtype policies: what variables, data and arithmetic are made of, and each rounding where it belongs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import Alone, BatchNormalization, MismatchError
from bnlayer.dtypes import Policy, dtype_named, is_real, rounded
from support.conformance import POLICIES, assert_close, in_compute_dtype, weights_of
from support.layers import gradients
from support.ranks import Meeting, SimulatedRank, run_all, run_ranks
from support.textbook import Settings, inferred, moments, moved, normalized
from support.truth import evaluate

HALVES = POLICIES[2:]


@pytest.mark.parametrize(
    ("name", "variables", "data", "arithmetic"),
    [
        ("float32", "float32", "float32", "float32"),
        ("float64", "float64", "float64", "float64"),
        ("float16", "float16", "float16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
        ("mixed_float16", "float32", "float16", "float32"),
        ("mixed_bfloat16", "float32", "bfloat16", "float32"),
    ],
)
def test_a_policy_determines_three_dtypes(name: str, variables: str, data: str, arithmetic: str) -> None:
    """And a layer has exactly these: weights, output, input gradient, parameter gradients."""
    policy = Policy.of(name)
    assert (policy.variable_dtype.name, policy.compute_dtype.name, policy.arithmetic) == (variables, data, arithmetic)
    for renorm in (False, True):
        bn = BatchNormalization(dtype=name, renorm=renorm)
        y = bn(np.arange(6.0).reshape(3, 2), training=True)
        dx = bn.backward(np.ones((3, 2)))
        assert (y.dtype.name, dx.dtype.name, bn(np.ones((3, 2))).dtype.name) == (data, data, data)
        assert {v.dtype.name for v in bn.weights} == {g.dtype.name for g in gradients(bn)} == {variables}
        assert (bn.dtype, bn.variable_dtype.name, bn.compute_dtype.name) == (variables, variables, data)
        assert bn.state.forward.dtype == arithmetic


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_can_be_named_in_every_way_that_keras_knows(name: str) -> None:
    """By name, by configuration, by an object that bears the name; dtypes where it is one."""
    config = Policy.of(name).get_config()
    assert config == {
        "module": "keras", "class_name": "DTypePolicy", "config": {"name": name}, "registered_name": None,
    }  # fmt: skip
    for value in (name, config, SimpleNamespace(name=name)):
        assert Policy.of(value) == Policy(name)
    if not name.startswith("mixed"):
        assert Policy.of(dtype_named(name)) == Policy.of(dtype_named(name).type) == Policy(name)
    assert BatchNormalization(dtype=name).get_config()["dtype"] == config


def test_no_policy_is_float32() -> None:
    """Keras's default."""
    assert Policy.of(None) == Policy("float32")


@pytest.mark.parametrize(
    "value", ["float8", "int32", "mixed_float32", np.int64, {"config": {}}, 32, "", np.dtype("complex64")]
)
def test_what_is_no_policy_is_refused(value: Any) -> None:
    """With what there is, and what was received."""
    with pytest.raises(ValueError) as caught:
        BatchNormalization(dtype=value)
    assert str(caught.value) == (
        "Expected a dtype policy, one of float32, float64, float16, bfloat16, mixed_float16, mixed_bfloat16; "
        f"received {value!r}."
    )


def test_floats_are_rounded_to_the_compute_dtype_first_and_integers_are_not() -> None:
    """Keras autocasts floats alone: 2049 is no float16, 257 no bfloat16, and 70000 would be infinite."""
    for policy, odd in (("float16", 2049), ("mixed_float16", 70000), ("bfloat16", 257), ("mixed_bfloat16", 257)):
        taken = Policy.of(policy).received([[odd]], "x")
        assert (taken.dtype.name, taken.tolist()) == ("float32", [[odd]])
        rounded = Policy.of(policy).received([[float(odd)]], "x")
        want = np.array([[float(odd)]]).astype(np.float64)
        with np.errstate(over="ignore"):
            assert rounded.tolist() == want.astype(Policy.of(policy).compute_dtype).tolist() != [[odd]]
    x = np.array([[1.0], [1.0 + 2.0**-12]])
    bn = BatchNormalization(dtype="mixed_float16", momentum=0.0)
    bn(x, training=True)
    assert bn.moving_variance.value.tolist() == [0.0]


def test_integers_go_to_the_arithmetic_straight() -> None:
    """The bits of the same numbers given as that arithmetic's floats, where those are no rounding away."""
    x = np.random.default_rng(0).integers(-100, 100, (9, 3))
    for policy in POLICIES:
        given: list[NDArray[Any]] = [x, x.astype(np.int8), x.astype(np.float64)]
        outputs = {BatchNormalization(dtype=policy)(values, training=True).tobytes() for values in given}
        assert len(outputs) == 1
    assert BatchNormalization()(x > 0, training=True).tobytes() == (
        BatchNormalization()((x > 0).astype(np.float32), training=True).tobytes()
    )


@pytest.mark.parametrize("values", [np.zeros((2, 2), complex), np.array([[None, 1]]), np.array([["1", "2"]])])
def test_what_is_no_number_is_refused(values: NDArray[Any]) -> None:
    """As inputs and as gradients."""
    with pytest.raises(TypeError) as caught:
        BatchNormalization()(values)
    assert str(caught.value) == f"Expected inputs of a real dtype, received dtype {values.dtype}."
    bn = BatchNormalization()
    bn(np.zeros(values.shape), training=True)
    with pytest.raises(TypeError) as caught:
        bn.backward(values)
    assert str(caught.value) == f"Expected dy of a real dtype, received dtype {values.dtype}."
    assert not is_real(values.dtype)
    assert is_real(np.dtype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("policy", HALVES)
def test_halves_are_within_one_rounding_of_the_exact_value(policy: str) -> None:
    """Output, input gradient, parameter gradients, moving statistics, inference; given float64 and given halves."""
    rng = np.random.default_rng(1)
    bn = BatchNormalization(dtype=policy, momentum=0.75, name="bn")
    settings = Settings(0.75, 1e-3)
    for step in range(4):
        x, dy = rng.standard_normal((50, 4)) * 3 + 5, rng.standard_normal((50, 4))
        if step % 2:
            x, dy = in_compute_dtype(policy, x), in_compute_dtype(policy, dy)
        seen, given = (in_compute_dtype(policy, a).astype(np.float64) for a in (x, dy))
        if bn.built:
            bn.set_weights([rng.uniform(0.5, 2, 4).astype(v.dtype) for v in bn.weights])
        y = bn(x, training=True)
        after = weights_of(bn)
        want = normalized(np, seen, after.gamma, after.beta, None, (np.ones(4), np.zeros(4)), 1e-3)
        assert_close(y, want, "output")
        dx = bn.backward(dy)
        truth = evaluate(seen, given)
        assert_close(dx, (after.gamma * truth.dx).astype(np.float64), "dx")
        for got, exact in zip(gradients(bn), (truth.gamma, truth.beta), strict=True):
            assert_close(got, exact.astype(np.float64), "gradient")
        assert_close(bn(x), inferred(seen, after, 1e-3), "inference")
        before = weights_of(bn)
        bn.vjp(x, training=True)
        for name, vector in moved(moments(np, seen, None), before, settings).items():
            assert_close(dict(zip((v.name for v in bn.weights), bn.get_weights(), strict=True))[name], vector, name)


def test_statistics_of_halves_do_not_overflow_on_the_way() -> None:
    """Sums and squares of 60000 have no float16; the result of a mixed policy has."""
    x = np.array([[60000.0], [-60000.0], [59000.0]], np.float16)
    bn = BatchNormalization(dtype="mixed_float16", momentum=0.0)
    y = bn(x, training=True)
    assert np.isfinite(y).all()
    assert bn.moving_variance.value == pytest.approx(x.astype(np.float64).var(0), rel=1e-6)


def test_a_variance_beyond_float16_leaves_the_owner_alone() -> None:
    """float16 variables end at 65504: a synchronized layer keeps its old values, a local one follows Keras."""
    x = np.array([[1000.0, 1.0], [-1000.0, 2.0]])
    synchronized = BatchNormalization(synchronized=True, collective=Alone(), dtype="float16", momentum=0.0)
    local = BatchNormalization(dtype="float16", momentum=0.0)
    for bn in (synchronized, local):
        assert np.isfinite(bn(x, training=True)).all()
    assert synchronized.moving_variance.value.tolist() == [1.0, 0.25]
    assert local.moving_variance.value.tolist() == [np.inf, 0.25]


def test_an_output_beyond_float16_is_infinite_without_a_warning() -> None:
    """As a cast in Keras is; warnings are errors here."""
    bn = BatchNormalization(dtype="float16", gamma_initializer=lambda s, d: np.full(s, 60000.0, d))
    y = bn(np.array([[0.0], [0.0], [0.0], [9.0]]), training=True)
    assert np.isinf(y).any()
    assert np.isinf(bn.backward(np.array([[0.0], [0.0], [60000.0], [0.0]]))).any()


@pytest.mark.parametrize("policy", HALVES)
def test_any_number_of_ranks_gives_one_process_bits(policy: str) -> None:
    """Halves too, with a rank without rows and masks that count per channel."""
    rng = np.random.default_rng(2)
    xs, dys = rng.standard_normal((3, 10, 4, 3)) * 2, rng.standard_normal((3, 10, 4, 3))
    masks = rng.random((3, 10, 4)) < 0.6

    def world(cuts: list[int]) -> list[list[bytes]]:
        def body(rank: SimulatedRank) -> list[list[NDArray[Any]]]:
            bn = BatchNormalization(axis=1, synchronized=True, name="bn", collective=rank, dtype=policy)
            seen = []
            for step, (x, dy, mask) in enumerate(zip(xs, dys, masks, strict=True)):
                x_, dy_, mask_ = (np.split(a, cuts)[rank.rank] for a in (x, dy, mask))
                y = bn(x_, training=True, mask=mask_ if step else None)
                seen.append([y, bn.backward(dy_), *gradients(bn), *bn.state.arrays().values()])
            return seen

        ranks = run_all(Meeting(len(cuts) + 1), body)
        out = []
        for step in zip(*ranks, strict=True):
            alike = [[a.tobytes() for a in rank[2:]] for rank in step]
            assert alike == [alike[0]] * len(alike)
            out.append([*(np.concatenate([rank[i] for rank in step]).tobytes() for i in (0, 1)), *alike[0]])
        return out

    one = world([])
    for cuts in ([3], [5, 5], [0, 2, 9]):
        assert world(cuts) == one


@pytest.mark.parametrize(
    ("mine", "others", "text"),
    [
        ("float16", "mixed_float16", "policy: rank 1 sent mixed_float16, ranks 0, 2 sent float16. "),
        ("float32", "float64", "dtype: rank 1 sent float64, ranks 0, 2 sent float32; policy: rank 1 sent float64, "),
    ],
)
def test_different_dtype_policies_are_a_mismatch(mine: str, others: str, text: str) -> None:
    """Their words may be of one arithmetic, but their moving statistics round differently."""

    def body(rank: SimulatedRank) -> None:
        policy = others if rank.rank == 1 else mine
        bn = BatchNormalization(dtype=policy, synchronized=True, name="bn", collective=rank)
        bn(np.ones((2, 2)), training=True)

    for reported in run_ranks(Meeting(3), body):
        assert isinstance(reported, MismatchError)
        assert str(reported).startswith(f"the enrolment of layer 'bn': {text}")


def test_a_state_goes_to_a_layer_of_its_variables_alone() -> None:
    """float16 variables don't hold float32 ones."""
    mixed, half = BatchNormalization(dtype="mixed_float16"), BatchNormalization(dtype="float16", name="half")
    for bn in (mixed, half):
        bn.build((None, 2))
    with pytest.raises(ValueError) as caught:
        half.restore(mixed.state)
    assert str(caught.value) == (
        "Layer 'half': expected a state of 2 channels in float32 with float16 variables, "
        "received 2 channels in float32 with float32 variables."
    )
    plain = BatchNormalization()
    plain.build((None, 2))
    plain.restore(mixed.state)


def test_float64_is_rounded_to_bfloat16_once() -> None:
    """NumPy goes by way of float32: 1 + 2^-8 + 2^-40 became 1.0, not 1 + 2^-7."""
    bfloat16 = dtype_named("bfloat16")
    ties = np.array(
        [1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 2.0**-8, -(1 + 2.0**-8 + 2.0**-40), 1e300, 1e-60]
    )
    got = rounded(ties, bfloat16).astype(np.float64)
    assert got.tolist() == [1 + 2.0**-7, 1.0, 1.0, -(1 + 2.0**-7), np.inf, 0.0]
    odd = np.array([np.nan, np.inf, -np.inf, -0.0])
    assert rounded(odd, bfloat16).astype(np.float32).tobytes() == odd.astype(bfloat16).astype(np.float32).tobytes()
    values = np.random.default_rng(0).standard_normal(10_000)
    exact = rounded(values, bfloat16).astype(np.float64)
    neighbours = np.stack([exact, exact * (1 + 2.0**-7), exact * (1 - 2.0**-7)])
    assert (np.abs(exact - values) <= np.abs(neighbours - values).min(0) + 1e-300).all()
