"""Batch renormalization: corrections from the global batch, held fixed in the derivative, the same on every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import Alone, BatchNormalization, MismatchError
from bnlayer.renorm import Renorm
from bnlayer.state import LayerState
from support.conformance import error, weights_of
from support.layers import gradients
from support.ranks import Meeting, SimulatedRank, run_all, run_ranks
from support.textbook import Settings, Wide, correction, inferred, moments, moved, normalized

CLIPPINGS: list[dict[str, float]] = [
    {},
    {"rmax": 1.1},
    {"rmin": 0.9},
    {"dmax": 0.2},
    {"rmax": 1.1, "rmin": 0.9, "dmax": 0.2},
    {"dmax": 0.0, "rmax": 1.0, "rmin": 1.0},
]
NAMES = ["gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"]


def renormalizing(
    clipping: dict[str, float] | None = None, shape: tuple[int | None, ...] = (None, 3), **arguments: Any
) -> BatchNormalization:
    """A built float64 layer of 3 channels whose slow statistics are neither 0 nor 1."""
    settings: dict[str, Any] = {"dtype": "float64", "momentum": 0.75, "renorm_momentum": 0.9, "name": "bn"}
    bn = BatchNormalization(renorm=True, renorm_clipping=clipping, **{**settings, **arguments})
    bn.build(shape)
    rng = np.random.default_rng(3)
    bn.set_weights([rng.uniform(0.5, 2.0, 3).astype(v.dtype) for v in bn.weights])
    return bn


def batch(seed: int, rows: int = 20) -> Wide:
    """Channels of unlike mean and spread."""
    return np.random.default_rng(seed).standard_normal((rows, 3)) * [0.3, 1.0, 4.0] + [-1.0, 0.5, 2.0]


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("clipping", CLIPPINGS, ids=str)
def test_outputs_and_all_five_statistics_follow_the_formulas(clipping: dict[str, float], masked: bool) -> None:
    """Three steps, each against the textbook; r and d come from the statistics as they were before the call."""
    bn, settings = renormalizing(clipping), Settings(0.75, 1e-3, 0.9, clipping)
    for step in range(3):
        x, before = batch(step), weights_of(bn)
        mask = np.random.default_rng(step).random(20) < 0.7 if masked else None
        m = None if mask is None else np.broadcast_to(mask[:, None], x.shape).astype(np.float64)
        statistics = moments(np, x, m)
        constants = correction(statistics, before, settings)
        want = normalized(np, x, before.gamma, before.beta, m, constants, 1e-3)
        assert error(bn(x, training=True, mask=mask), want) <= 1e-10
        for name, vector in moved(statistics, before, settings).items():
            assert error(weights_of(bn).moving[name], vector) <= 1e-12
        assert error(bn(x), inferred(x, weights_of(bn), 1e-3)) <= 1e-10


def test_clipping_takes_effect_beyond_its_bounds() -> None:
    """Both corrections reach their limits in some channel, and exceed them without clipping."""
    bn = renormalizing()
    before, statistics = weights_of(bn), moments(np, batch(0), None)
    free = correction(statistics, before, Settings(0.75, 1e-3, 0.9, {}))
    bound = correction(statistics, before, Settings(0.75, 1e-3, 0.9, CLIPPINGS[4]))
    assert free[0].min() < 0.9
    assert free[0].max() > 1.1
    assert np.abs(free[1]).max() > 0.2
    assert (bound[0].min(), bound[0].max(), np.abs(bound[1]).max()) == (0.9, 1.1, 0.2)


def test_with_corrections_clipped_away_it_is_plain_batch_normalization() -> None:
    """r = 1 and d = 0: the bits of the layer without renorm, forward and backward."""
    x, dy = batch(0), batch(1)
    bn = renormalizing(CLIPPINGS[5])
    plain = BatchNormalization(dtype="float64")
    plain.build((None, 3))
    plain.set_weights(bn.get_weights()[:4])
    assert bn(x, training=True).tobytes() == plain(x, training=True).tobytes()
    assert bn.backward(dy).tobytes() == plain.backward(dy).tobytes()
    assert [g.tobytes() for g in gradients(bn)] == [g.tobytes() for g in gradients(plain)]


def test_a_slow_deviation_of_nothing_counts_as_the_root_of_epsilon() -> None:
    """Early in training renorm_stddev may be 0: r and d stay finite."""
    bn = renormalizing()
    x = batch(0)
    values = bn.get_weights()
    values[6] = np.zeros(3)
    bn.set_weights(values)
    before = weights_of(bn)
    y = bn(x, training=True)
    mean, variance = moments(np, x, None)
    slow = np.sqrt(1e-3)
    r, d = np.sqrt(variance + 1e-3) / slow, (mean - before.moving["renorm_mean"]) / slow
    assert error(y, normalized(np, x, before.gamma, before.beta, None, (r, d), 1e-3)) <= 1e-10
    assert np.isfinite(y).all()


def test_the_moving_variance_is_the_squared_deviation_less_epsilon_and_never_negative() -> None:
    """For constant data the two nearly cancel; rounding must not leave a negative variance."""
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        bn = BatchNormalization(renorm=True, momentum=0.0, dtype=dtype)
        for value in (0.0, 1.0, 3.3, 1e3):
            bn(np.full((7, 2), value), training=True)
            variance = bn.moving_variance.value.astype(np.float64)
            assert (variance >= 0).all()
            assert variance == pytest.approx([0, 0], abs=1e-9)
    bn = renormalizing()
    bn(batch(0), training=True)
    assert bn.moving_variance.value == pytest.approx(bn.moving_stddev.value**2 - 1e-3, rel=1e-14)


def test_the_derivative_holds_both_corrections_fixed() -> None:
    """dx, dγ and dβ are the differences of the output with r and d as constants; with both let go they are others."""
    x, w, h = batch(5, 7), batch(6, 7), 1e-6
    settings = Settings(0.75, 1e-3, 0.9, {"rmax": 1.5, "dmax": 1.0})
    for mask in (None, np.array([1, 1, 0, 1, 1, 1, 0], bool)):
        bn = renormalizing({"rmax": 1.5, "dmax": 1.0})
        before = weights_of(bn)
        m = None if mask is None else np.broadcast_to(mask[:, None], x.shape).astype(np.float64)
        fixed = correction(moments(np, x, m), before, settings)

        def loss(
            at: Wide,
            gamma: Wide,
            beta: Wide,
            free: bool = False,
            m: Wide | None = m,
            fixed: Any = fixed,
            b: Any = before,
        ) -> float:
            constants = correction(moments(np, at, m), b, settings) if free else fixed
            return float((w * normalized(np, at, gamma, beta, m, constants, 1e-3)).sum())

        bn(x, training=True, mask=mask)
        dx, (dgamma, dbeta) = bn.backward(w), gradients(bn)
        free = np.zeros_like(x)
        for index in np.ndindex(*x.shape):
            step = np.zeros_like(x)
            step[index] = h
            held = (loss(x + step, before.gamma, before.beta) - loss(x - step, before.gamma, before.beta)) / (2 * h)
            assert abs(held - dx[index]) <= 1e-6
            plus, minus = (loss(x + s, before.gamma, before.beta, free=True) for s in (step, -step))
            free[index] = (plus - minus) / (2 * h)
        assert np.abs(free - dx).max() > 1e-2
        for c in range(3):
            step = np.eye(3)[c] * h
            g, b = before.gamma, before.beta
            assert abs((loss(x, g + step, b) - loss(x, g - step, b)) / (2 * h) - dgamma[c]) <= 1e-6
            assert abs((loss(x, g, b + step) - loss(x, g, b - step)) / (2 * h) - dbeta[c]) <= 1e-6


@pytest.mark.parametrize(
    ("clipping", "text"),
    [
        (
            {"rmax": 3, "rmean": 1},
            (
                "Received invalid keys for `renorm_clipping` argument: {'rmax': 3, 'rmean': 1}. "
                "Supported values: ['rmax', 'rmin', 'dmax']."
            ),
        ),
        (
            {"rmax": 0.25, "rmin": 4.5},
            "rmax should be greater than rmin in the `renorm_clipping` argument. Received: rmax=0.25, rmin=4.5.",
        ),
        ({"dmax": -0.5}, "dmax should be non-negative in the `renorm_clipping` argument. Received: dmax=-0.5."),
    ],
)
def test_bad_clipping_is_refused_with_its_numbers(clipping: dict[str, float], text: str) -> None:
    """When the layer is made; without renorm nobody looks at it, and the configuration keeps it."""
    with pytest.raises(ValueError) as caught:
        BatchNormalization(renorm=True, renorm_clipping=clipping)
    assert str(caught.value) == text
    assert BatchNormalization(renorm_clipping=clipping).get_config()["renorm_clipping"] == clipping
    assert Renorm.of(0.9, {"rmax": 1, "rmin": 1, "dmax": 0}) == Renorm(0.9, 1, 1, 0)


def test_seven_weights_in_keras_order() -> None:
    """Two of them trainable, none when frozen; in and out by position."""
    bn = BatchNormalization(renorm=True)
    bn.build((None, 2))
    assert [v.name for v in bn.weights] == NAMES
    assert [v.name for v in bn.trainable_weights] == NAMES[:2]
    bn.trainable = False
    assert (len(bn.weights), len(bn.trainable_weights), len(bn.non_trainable_weights)) == (7, 0, 7)
    values = [np.full(2, float(i)) for i in range(7)]
    bn.set_weights(values)
    assert [v.value.tolist() for v in bn.weights] == [v.tolist() for v in values]
    assert (bn.renorm_mean.value[0], bn.renorm_stddev.value[0], bn.moving_stddev.value[0]) == (5, 6, 4)
    with pytest.raises(ValueError, match=r"expected 7 weights .* renorm_stddev\(2,\)\), received 4 of shapes"):
        bn.set_weights(values[:4])


@pytest.mark.parametrize("policy", ["float32", "float64", "bfloat16", "mixed_float16"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_any_number_of_ranks_gives_one_process_bits(masked: bool, policy: str) -> None:
    """1 to 4 ranks, one without a row, masks that count per channel: outputs, gradients, all five statistics."""
    rng = np.random.default_rng(0)
    xs, dys = rng.standard_normal((4, 12, 3, 5)) * 2 + 1, rng.standard_normal((4, 12, 3, 5))
    masks = rng.random((4, 12, 3)) < 0.6

    def world(cuts: list[int]) -> list[list[bytes]]:
        def body(rank: SimulatedRank) -> list[list[NDArray[Any]]]:
            shape = (None, 3, 5)
            bn = renormalizing(CLIPPINGS[4], shape, axis=1, synchronized=True, collective=rank, dtype=policy)
            seen = []
            for x, dy, mask in zip(xs, dys, masks, strict=True):
                x_, dy_, mask_ = (np.split(a, cuts)[rank.rank] for a in (x, dy, mask))
                y = bn(x_, training=True, mask=mask_ if masked else None)
                seen.append([y, bn.backward(dy_), *gradients(bn), *bn.get_weights()])
            return seen

        ranks = run_all(Meeting(len(cuts) + 1), body)
        out = []
        for step in zip(*ranks, strict=True):
            alike = [[a.tobytes() for a in rank[2:]] for rank in step]
            assert alike == [alike[0]] * len(alike)
            out.append([*(np.concatenate([rank[i] for rank in step]).tobytes() for i in (0, 1)), *alike[0]])
        return out

    one = world([])
    for cuts in ([5], [4, 4], [0, 3, 11]):
        assert world(cuts) == one


def test_different_renorm_settings_are_a_mismatch() -> None:
    """Clipping is part of what every rank must believe."""

    def body(rank: SimulatedRank) -> None:
        clipping = {"rmax": 2.0} if rank.rank else {"rmax": 3.0}
        bn = BatchNormalization(
            renorm=rank.rank < 2, renorm_clipping=clipping, synchronized=True, name="bn", collective=rank
        )
        bn(np.ones((2, 2)), training=True)

    for error_ in run_ranks(Meeting(2), body):
        assert isinstance(error_, MismatchError)
        assert str(error_).startswith(
            "the enrolment of layer 'bn': renorm: "
            "rank 0 sent Renorm(momentum=0.99, rmax=3.0, rmin=None, dmax=None), "
            "rank 1 sent Renorm(momentum=0.99, rmax=2.0, rmin=None, dmax=None). All ranks must"
        )
    for error_ in run_ranks(Meeting(3), body):
        assert isinstance(error_, MismatchError)
        assert "rank 2 sent None" in str(error_)


def test_bad_values_leave_all_five_statistics_of_the_owner_alone() -> None:
    """One rank's NaN must not destroy what all share; a local layer follows Keras."""
    x = batch(0).astype(np.float32)
    x[3, 1] = np.nan
    for synchronized in (True, False):
        world: dict[str, Any] = {"collective": Alone()} if synchronized else {}
        bn = renormalizing(dtype="float32", synchronized=synchronized, **world)
        before = bn.get_weights()[2:]
        assert np.isnan(bn(x, training=True)[:, 1]).all()
        for old, new in zip(before, bn.get_weights()[2:], strict=True):
            assert new[0] != old[0]
            assert new[1] == old[1] if synchronized else np.isnan(new[1])


def test_its_state_is_restored_completely_and_only_into_a_layer_of_its_kind() -> None:
    """All five vectors as named arrays, and refused by a layer without renorm."""
    bn, other = renormalizing(), renormalizing()
    bn(batch(0), training=True)
    arrays = bn.state.arrays()
    assert list(arrays)[:5] == NAMES[2:]
    other.restore(LayerState.from_arrays(arrays, "float64"))
    assert bn(batch(1), training=True).tobytes() == other(batch(1), training=True).tobytes()
    with pytest.raises(ValueError, match="lacks 'renorm_stddev'; it has"):
        LayerState.from_arrays({k: v for k, v in arrays.items() if k != "renorm_stddev"}, "float64")
    plain = BatchNormalization(dtype="float64", name="plain")
    plain.build((None, 3))
    with pytest.raises(ValueError) as caught:
        plain.restore(bn.state)
    kind = "3 channels in float64 with float64 variables"
    assert str(caught.value) == f"Layer 'plain': expected a state of {kind}, received {kind} and renorm."
