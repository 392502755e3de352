"""The layer alone: Keras's behaviour where Keras is right, a clear one where it is not."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import Alone, BatchNormalization
from bnlayer.collective import installed
from support.layers import gradients
from support.ranks import Meeting, SimulatedRank, run_all
from support.truth import error, evaluate

RNG = np.random.default_rng(7)


def batch(*shape: int, dtype: str = "float32") -> NDArray[Any]:
    """Normal data with unlike channels."""
    return (RNG.standard_normal(shape) * 3 + np.arange(shape[-1])).astype(dtype)


def flat(axis: int, a: NDArray[Any]) -> NDArray[Any]:
    """(N, C), with the channels from an axis."""
    return np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((6, 5), 1),
        ((6, 5), 0),
        ((4, 3, 5), -1),
        ((4, 3, 5), 1),
        ((2, 3, 4, 5), 1),
        ((2, 3, 4, 5), -1),
        ((2, 3, 2, 2, 4), 2),
    ],
)
def test_every_axis_and_rank_matches_the_textbook(shape: tuple[int, ...], axis: int, dtype: str) -> None:
    """Forward, backward and moving statistics for channels first, last and between."""
    x, dy = batch(*shape, dtype=dtype), batch(*shape, dtype=dtype)
    bn = BatchNormalization(axis=axis, dtype=dtype, momentum=0.75)
    y, dx = bn(x, training=True), bn.backward(dy)
    want = evaluate(flat(axis, x), flat(axis, dy))
    bound = 2e-6 if dtype == "float32" else 1e-10
    assert y.shape == dx.shape == shape
    assert y.dtype == dx.dtype == np.dtype(dtype)
    assert error(flat(axis, y), want.y) <= bound
    assert error(flat(axis, dx), want.dx) <= bound
    assert error(bn.moving_mean.value, 0.25 * want.mean) <= bound
    assert error(bn.moving_variance.value, 0.75 + 0.25 * want.variance) <= bound


@pytest.mark.parametrize("layout", ["transposed", "reversed", "strided", "fortran"])
def test_a_view_gives_the_bits_of_its_copy(layout: str) -> None:
    """pytorch #57077, #62967, apex #1768: wrong values for some layouts."""
    base = batch(8, 6, 10)
    view = {
        "transposed": base.transpose(1, 0, 2),
        "reversed": base[::-1, :, ::-1],
        "strided": base[::2, ::3, ::2],
        "fortran": np.asfortranarray(base),
    }[layout]
    copy = np.ascontiguousarray(view)
    one, other = BatchNormalization(), BatchNormalization()
    assert one(view, training=True).tobytes() == other(copy, training=True).tobytes()
    assert one.backward(view).tobytes() == other.backward(copy).tobytes()


@pytest.mark.parametrize("channels", [1, 65, 2049])
def test_channel_counts_off_every_block(channels: int) -> None:
    """apex #1768: wrong beyond 64 channels."""
    x, dy = batch(9, channels), RNG.standard_normal((9, channels)).astype(np.float32)
    bn = BatchNormalization()
    want = evaluate(x, dy)
    assert error(bn(x, training=True), want.y) <= 2e-6
    assert error(bn.backward(dy), want.dx) <= 2e-6


def test_blocks_of_large_arrays_do_not_change_the_result() -> None:
    """More elements than one block of the reference kernels holds, with the cut along rows and along columns."""
    x, dy = batch(3, 2, 70_000), batch(3, 2, 70_000)
    bn = BatchNormalization(axis=1)
    want = evaluate(flat(1, x), flat(1, dy))
    assert error(flat(1, bn(x, training=True)), want.y) <= 2e-6
    assert error(flat(1, bn.backward(dy)), want.dx) <= 2e-6


def test_gradients_agree_with_finite_differences() -> None:
    """d(Σ w·y)/dx, dγ and dβ against central differences in float64, masked and not."""
    x, w = batch(7, 3, dtype="float64"), batch(7, 3, dtype="float64")
    for mask in (None, np.array([1, 1, 0, 1, 1, 1, 0], bool)):
        bn = BatchNormalization(dtype="float64", name="bn")

        def loss(values: NDArray[Any], m: NDArray[Any] | None = mask, layer: BatchNormalization = bn) -> float:
            return float((w * layer(values, training=True, mask=m)).sum())

        loss(x)
        dx = bn.backward(w)
        assert bn.gamma is not None
        assert bn.beta is not None
        exact = gradients(bn)
        h = 1e-6
        for index in np.ndindex(*x.shape):
            plus, minus = x.copy(), x.copy()
            plus[index] += h
            minus[index] -= h
            assert abs((loss(plus) - loss(minus)) / (2 * h) - dx[index]) <= 1e-6
        for variable, gradient in zip((bn.gamma, bn.beta), exact, strict=True):
            for c in range(3):
                start = variable.numpy()
                values = []
                for sign in (1, -1):
                    moved = start.copy()
                    moved[c] += sign * h
                    variable.assign(moved)
                    values.append(loss(x))
                variable.assign(start)
                assert abs((values[0] - values[1]) / (2 * h) - gradient[c]) <= 1e-6


def test_inference_uses_the_moving_statistics_and_changes_nothing() -> None:
    """`training=None` means inference."""
    x = batch(20, 4)
    bn = BatchNormalization()
    bn(x, training=True)
    before = [w.tobytes() for w in bn.get_weights()]
    y = bn(x)
    mean, variance = bn.moving_mean.value, bn.moving_variance.value
    assert error(y, (x - mean.astype(np.longdouble)) / np.sqrt(variance.astype(np.longdouble) + 1e-3)) <= 2e-6
    assert [w.tobytes() for w in bn.get_weights()] == before
    assert bn(x, training=False).tobytes() == y.tobytes()


def test_frozen_layer_is_in_inference_mode_and_passes_gradients_on() -> None:
    """`trainable=False`: no update, no trainable weights, no losses; dx = γs·dy without parameter gradients."""
    x, dy = batch(20, 4), batch(20, 4)
    bn = BatchNormalization(gamma_regularizer="l2")
    bn.vjp(x, training=True)
    assert (len(bn.weights), len(bn.trainable_weights), len(bn.non_trainable_weights)) == (4, 2, 2)
    assert len(bn.losses) == 1
    bn.trainable = False
    assert (len(bn.weights), len(bn.trainable_weights), len(bn.non_trainable_weights)) == (4, 0, 4)
    assert bn.losses == []
    assert bn.regularizer_gradients() == []
    before = bn.moving_mean.numpy()
    assert bn(x, training=True).tobytes() == bn(x).tobytes()
    dx = bn.backward(dy)
    assert error(dx, dy / np.sqrt(bn.moving_variance.value.astype(np.longdouble) + 1e-3)) <= 2e-6
    assert bn.gamma is not None
    assert bn.gamma.gradient is None
    assert (bn.moving_mean.value == before).all()


def test_backward_belongs_to_the_latest_training_call() -> None:
    """A second backward raises; an evaluation in between does not disturb it; dy must fit."""
    x, dy = batch(8, 3), batch(8, 3)
    bn, other = BatchNormalization(), BatchNormalization()
    with pytest.raises(RuntimeError, match=r"backward\(\) belongs to the latest training call"):
        bn.backward(dy)
    bn(x, training=True)
    other(x, training=True)
    bn(x[:2], training=False)
    with pytest.raises(ValueError, match=r"expected dy of the output's shape \(8, 3\), received \(7, 3\)"):
        bn.backward(dy[:7])
    assert bn.backward(dy).tobytes() == other.backward(dy).tobytes()
    with pytest.raises(RuntimeError, match="Call the layer with training=True first"):
        bn.backward(dy)


def test_zero_rows_give_an_empty_output_and_no_update() -> None:
    """Keras's moving statistics turn NaN here."""
    bn = BatchNormalization()
    empty = np.zeros((0, 3), np.float32)
    assert bn(empty, training=True).shape == (0, 3)
    assert bn.backward(empty).shape == (0, 3)
    assert bn.moving_mean.value.tolist() == [0, 0, 0]
    assert bn.moving_variance.value.tolist() == [1, 1, 1]


def test_a_fully_masked_batch_updates_as_keras_does_alone_and_nothing_when_synchronized() -> None:
    """A local layer's moving statistics decay towards 0; a synchronized layer leaves them alone."""
    x, mask = batch(5, 2), np.zeros(5, bool)
    local, synchronized = BatchNormalization(), BatchNormalization(synchronized=True, collective=Alone())
    local(x, training=True, mask=mask)
    assert local.moving_variance.value.tolist() == [np.float32(0.99)] * 2
    synchronized(x, training=True, mask=mask)
    assert synchronized.moving_variance.value.tolist() == [1, 1]


def test_ignored_values_do_not_count() -> None:
    """Keras's own case: of [1, 2], [5, 5] under False, mean and variance are those of what is left."""
    x = np.array([[[1.0, 5.0]], [[2.0, 5.0]], [[9e9, -9e9]]])
    bn = BatchNormalization(momentum=0.0)
    bn(x, training=True, mask=np.array([[True], [True], [False]]))
    assert bn.moving_mean.value == pytest.approx([1.5, 5.0], abs=1e-5)
    assert bn.moving_variance.value == pytest.approx([0.25, 0.0], abs=1e-5)


def test_mask_counts_per_channel_where_the_axis_is_not_the_last() -> None:
    """The mask is expanded on the LAST axis: with channels first it covers the channel axis."""
    x = batch(4, 3, 5, dtype="float64")
    mask = RNG.random((4, 3)) < 0.6
    mask[0] = True
    bn = BatchNormalization(axis=1, dtype="float64", momentum=0.0)
    bn(x, training=True, mask=mask)
    for channel in range(3):
        unmasked = x[mask[:, channel], channel].ravel()
        assert bn.moving_mean.value[channel] == pytest.approx(unmasked.mean(), rel=1e-6)
        assert bn.moving_variance.value[channel] == pytest.approx(unmasked.var(), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_masked_never_leaks(bad: float) -> None:
    """NaN and Inf under a False mask reach no statistic and no gradient of an unmasked position."""
    x, dy = batch(6, 3), batch(6, 3)
    mask = np.array([1, 1, 0, 1, 0, 1], bool)
    clean, dirty = BatchNormalization(), BatchNormalization()
    spoiled = x.copy()
    spoiled[2, 1] = bad
    x[2, 1] = 0
    y, z = clean(x, training=True, mask=mask), dirty(spoiled, training=True, mask=mask)
    assert y[mask].tobytes() == z[mask].tobytes()
    assert clean.moving_mean.value.tobytes() == dirty.moving_mean.value.tobytes()
    dx = dirty.backward(dy)
    assert np.isfinite(dx).all()
    assert np.isfinite(gradients(dirty)[0]).all()


def test_a_nan_poisons_its_channel_alone_and_not_the_owner() -> None:
    """y, dx, dγ, dβ of the channel are NaN; a synchronized layer's moving statistics survive, a local one's don't."""
    x, dy = batch(6, 3), batch(6, 3)
    x[4, 1] = np.nan
    synchronized = BatchNormalization(synchronized=True, collective=Alone())
    local = BatchNormalization()
    for bn in (synchronized, local):
        y, dx = bn(x, training=True), bn.backward(dy)
        for values in (y, dx, *gradients(bn)):
            assert np.isnan(values[..., 1]).all()
            assert np.isfinite(values[..., [0, 2]]).all()
    assert (synchronized.moving_mean.value[1], synchronized.moving_variance.value[1]) == (0, 1)
    assert np.isnan(local.moving_mean.value[1])


def test_a_nan_gradient_poisons_its_channel() -> None:
    """A dy that is not finite at an unmasked position; the other channels are exact."""
    x, dy = batch(6, 3), batch(6, 3)
    dy[2, 0] = np.inf
    bn = BatchNormalization()
    bn(x, training=True)
    dx = bn.backward(dy)
    assert np.isnan(dx[:, 0]).all()
    assert np.isfinite(dx[:, 1:]).all()


def test_float32_data_too_wide_for_any_window_gives_nan_not_a_wrong_result() -> None:
    """Near float32's limits a squared deviation has no room on the grid."""
    bn = BatchNormalization(synchronized=True, collective=Alone())
    y = bn(np.array([[3e38], [-3e38], [1e38]], np.float32), training=True)
    assert np.isnan(y).all()
    assert bn.moving_variance.value.tolist() == [1]


def test_variance_beyond_float32_leaves_the_owner_alone() -> None:
    """A standard deviation above 1.8e19 has no float32 variance: Inf must not enter the moving statistics."""
    x = np.array([[5e20], [-5e20]], np.float32)
    synchronized, local = BatchNormalization(synchronized=True, collective=Alone()), BatchNormalization()
    for bn in (synchronized, local):
        assert np.isfinite(bn(x, training=True)).all()
    assert (synchronized.moving_mean.value.tolist(), synchronized.moving_variance.value.tolist()) == ([0], [1])
    assert np.isinf(local.moving_variance.value).all()


def test_integers_and_halves_are_cast_once() -> None:
    """Any real dtype is accepted; complex and objects are not."""
    x = RNG.integers(-(2**40), 2**40, (6, 3))
    assert BatchNormalization()(x, training=True).tobytes() == (
        BatchNormalization()(x.astype(np.float32), training=True).tobytes()
    )
    half = batch(6, 3).astype(np.float16)
    assert BatchNormalization()(half, training=True).dtype == np.float32
    with pytest.raises(TypeError, match="Expected inputs of a real dtype, received dtype complex128"):
        BatchNormalization()(x * 1j)


def test_center_and_scale_switch_beta_and_gamma_off() -> None:
    """The variables in Keras's order, and outputs and gradients without them."""
    x, dy = batch(6, 3), batch(6, 3)
    names = {}
    for center in (True, False):
        for scale in (True, False):
            bn = BatchNormalization(center=center, scale=scale, gamma_initializer=lambda s, d: np.full(s, 2.0, d))
            y = bn(x, training=True)
            dx = bn.backward(dy)
            want = evaluate(x, dy)
            factor = 2 if scale else 1
            assert error(y, factor * want.y) <= 2e-6
            assert error(dx, factor * want.dx) <= 2e-6
            names[center, scale] = [w.name for w in bn.weights]
    moving = ["moving_mean", "moving_variance"]
    assert names == {
        (True, True): ["gamma", "beta", *moving],
        (True, False): ["beta", *moving],
        (False, True): ["gamma", *moving],
        (False, False): moving,
    }


def test_local_gradients_add_up_to_the_global_ones() -> None:
    """`grad_reduction="local"` is a rank's share, which a wrapper sums: nnabla #1120 reduced it twice."""
    x, dy = batch(9, 3), batch(9, 3)

    def world(world_size: int, reduction: Literal["global", "local"]) -> list[NDArray[Any]]:
        def body(rank: SimulatedRank) -> NDArray[Any]:
            bn = BatchNormalization(synchronized=True, name="bn", collective=rank, grad_reduction=reduction)
            cuts = [2, 2][: world_size - 1]
            bn(np.split(x, cuts)[rank.rank], training=True)
            bn.backward(np.split(dy, cuts)[rank.rank])
            return np.stack(gradients(bn))

        return run_all(Meeting(world_size), body)

    alone = world(1, "global")[0]
    assert [g.tobytes() for g in world(3, "global")] == [alone.tobytes()] * 3
    shares = world(3, "local")
    assert shares[1].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert np.sum(shares, axis=0) == pytest.approx(alone, abs=1e-5)


def test_state_travels_with_its_grid() -> None:
    """A layer restored from another's state goes on with the same bits; without the grid it probes first."""
    x = batch(9, 3)
    first, second = BatchNormalization(), BatchNormalization()
    first(x, training=True)
    with pytest.raises(ValueError, match="has no state yet"):
        _ = second.state
    second.build((None, 3))
    second.restore(first.state)
    assert first(x * 2, training=True).tobytes() == second(x * 2, training=True).tobytes()
    assert second.state.version == 2
    wide = BatchNormalization(dtype="float64")
    wide.build((None, 3))
    kinds = [f"3 channels in {dtype} with {dtype} variables" for dtype in ("float64", "float32")]
    with pytest.raises(ValueError, match=f"expected a state of {kinds[0]}, received {kinds[1]}"):
        wide.restore(first.state)


def test_synchronized_alone_uses_the_installed_collective() -> None:
    """Without a world a synchronized layer is a world of one; an installed one is used from then on."""
    collective = Alone()
    bn = BatchNormalization(synchronized=True, name="uses-installed")
    bn(batch(4, 2), training=True)
    with installed(collective):
        bn(batch(4, 2), training=True)
    assert bn.state.version == 2


def test_the_unbiased_moving_variance_is_torchs() -> None:
    """N/(N − 1) times the batch's, once; a single value has none, and leaves both statistics alone."""
    x = np.random.default_rng(0).normal(2, 3, (5, 3)).astype(np.float32)
    for compiled in (np.float32, np.float64):
        bn = BatchNormalization(momentum=0.9, dtype=np.dtype(compiled).name)
        bn.unbiased = True
        bn(x, training=True)
        np.testing.assert_allclose(bn.moving_variance.value, 0.9 + 0.1 * x.astype(np.float64).var(0, ddof=1), rtol=1e-6)
        before = [w.tobytes() for w in bn.get_weights()]
        bn(x[:1], training=True)
        bn(x[:0], training=True)
        assert [w.tobytes() for w in bn.get_weights()] == before


def test_only_channels_that_do_not_fit_get_a_new_grid() -> None:
    """One channel grows beyond its window: the others keep theirs, and the result is that of the exact statistics."""
    x = np.random.default_rng(8).standard_normal((64, 5)).astype(np.float32)
    layer = BatchNormalization()
    layer(x, training=True)
    before = layer.state.forward
    x *= np.float32(0.25)  # which a probe would answer with a finer grid
    x[:, 2] *= np.float32(1e6)
    y = layer(x, training=True)
    after = layer.state.forward
    assert np.flatnonzero(after.exponent_C != before.exponent_C).tolist() == [2]
    exact = x.astype(np.float64)
    np.testing.assert_allclose(y, (exact - exact.mean(0)) / np.sqrt(exact.var(0) + layer.epsilon), atol=1e-5)
