"""Folding a layer into the kernel beside it: the same map, rounded once."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.interchange import fold, fold_following

Wide = NDArray[np.float64]


def _layer(channels: int, *, mean: float = 0.5, axis: int = -1, ndim: int = 2, **arguments: Any) -> BatchNormalization:
    """A layer with weights of its own in every channel."""
    bn = BatchNormalization(name="bn", axis=axis, **arguments)
    bn.build((channels,) * ndim)
    rng = np.random.default_rng(3)
    ranges = {"gamma": (0.5, 2), "beta": (-1, 1), "moving_mean": (mean - 1, mean + 1)}
    bn.set_weights([rng.uniform(*ranges.get(v.name, (0.3, 3)), channels) for v in bn.weights])
    return bn


def _plain(bn: BatchNormalization, z: Wide, axis: int) -> Wide:
    """The layer in inference mode by its formula, in float64."""
    shape = [-1 if i == axis % z.ndim else 1 for i in range(z.ndim)]
    values = {v.name: v.value.astype(np.float64).reshape(shape) for v in bn.weights}
    normalized = (z - values["moving_mean"]) / np.sqrt(values["moving_variance"] + bn.epsilon)
    return np.asarray(normalized * values.get("gamma", 1.0) + values.get("beta", 0.0))


def _convolved(x: Wide, kernel: Wide, bias: Wide) -> Wide:
    """x (N, H, W, I) with a kernel (h, w, I, O), without padding."""
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.asarray(np.einsum("nhwikl,klio->nhwo", windows, kernel) + bias)


def _error(got: Wide, want: Wide) -> float:
    return float(np.max(np.abs(got - want) / (1 + np.abs(want))))


@pytest.mark.parametrize(
    "arguments", [{}, {"center": False}, {"scale": False}, {"center": False, "scale": False}, {"renorm": True}]
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mean", [0.5, 1e4])
def test_a_dense_kernel_takes_the_layer_behind_it(arguments: dict[str, Any], channels: int, mean: float) -> None:
    """In float64, against the layer's own inference; a mean of 1e4 costs its four digits and no more."""
    rng, bn = np.random.default_rng(4), _layer(channels, mean=mean, dtype="float64", **arguments)
    x, kernel, bias = rng.normal(0, 1, (6, 5)), rng.normal(0, 1, (5, channels)), rng.normal(mean, 1, channels)
    folded, offset = fold(bn, kernel, bias)
    assert (folded.shape, offset.shape) == (kernel.shape, (channels,))
    assert folded.dtype == offset.dtype == np.float64
    bound = 1e-14 * max(1, mean)
    assert _error(x @ folded + offset, bn(x @ kernel + bias)) < bound
    assert _error(x @ folded + offset, _plain(bn, x @ kernel + bias, -1)) < bound
    without, offset = fold(bn, kernel)
    assert without.tobytes() == folded.tobytes()
    assert _error(x @ without + offset, _plain(bn, x @ kernel, -1)) < bound


def test_a_float32_kernel_loses_its_own_rounding_and_no_more() -> None:
    """At a mean of 1e4: each folded value is off by half a unit in its last place, which bounds the output's error."""
    rng, bn = np.random.default_rng(4), _layer(3, mean=1e4)
    x, kernel = rng.normal(0, 1, (6, 5)), rng.normal(0, 1, (5, 3)).astype(np.float32)
    bias = rng.normal(1e4, 1, 3).astype(np.float32)
    folded, offset = fold(bn, kernel, bias)
    want = _plain(bn, x @ kernel.astype(np.float64) + bias.astype(np.float64), -1)
    got = x @ folded.astype(np.float64) + offset.astype(np.float64)
    bound = 2.0**-24 * (np.abs(x) @ np.abs(folded) + np.abs(offset)) + 1e-9
    assert (np.abs(got - want) <= bound).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("policy", ["float16", "bfloat16", "float32", "float64", "mixed_bfloat16"])
def test_values_are_rounded_once_to_the_kernels_dtype(dtype: Any, policy: str) -> None:
    """Bit for bit the formula in float64, cast at the end, whatever the layer's dtype."""
    rng, bn = np.random.default_rng(4), _layer(64, mean=7.0, dtype=policy)
    kernel, bias = rng.normal(0, 1, (8, 64)).astype(dtype), rng.normal(7, 1, 64).astype(dtype)
    gamma, beta, mean, variance = (w.astype(np.float64) for w in bn.get_weights())
    s = gamma / np.sqrt(variance + bn.epsilon)
    folded, offset = fold(bn, kernel, bias)
    assert folded.dtype == offset.dtype == np.dtype(dtype)
    assert folded.tobytes() == (kernel.astype(np.float64) * s).astype(dtype).tobytes()
    assert offset.tobytes() == ((bias.astype(np.float64) - mean) * s + beta).astype(dtype).tobytes()


def test_convolutions_of_keras_and_of_torch() -> None:
    """(kh, kw, in, out) with the channels last, (out, in, kh, kw) with them first: one map."""
    rng, bn = np.random.default_rng(4), _layer(4, dtype="float64", ndim=4)
    x, kernel, bias = rng.normal(0, 1, (2, 6, 5, 3)), rng.normal(0, 1, (3, 2, 3, 4)), rng.normal(0, 1, 4)
    folded, offset = fold(bn, kernel, bias)
    assert _error(_convolved(x, folded, offset), bn(_convolved(x, kernel, bias))) < 1e-14
    torchs, torchs_offset = fold(bn, kernel.transpose(3, 2, 0, 1), bias, channel_axis=0)
    assert np.array_equal(torchs.transpose(2, 3, 1, 0), folded)
    assert torchs_offset.tobytes() == offset.tobytes()


def test_a_following_kernel_takes_the_layer_before_it() -> None:
    """Dense and convolution, in both layouts; without padding the convolution is right to the border."""
    rng, bn = np.random.default_rng(4), _layer(3, mean=1e4, dtype="float64", ndim=4)
    x, kernel, bias = rng.normal(1e4, 1, (2, 6, 5, 3)), rng.normal(0, 1, (3, 2, 3, 4)), rng.normal(0, 1, 4)
    folded, offset = fold_following(bn, kernel, bias)
    want = _convolved(_plain(bn, x, -1), kernel, bias)
    assert _error(_convolved(x, folded, offset), want) < 1e-10
    torchs, torchs_offset = fold_following(bn, kernel.transpose(3, 2, 0, 1), bias, channel_axis=1, output_axis=0)
    assert np.array_equal(torchs.transpose(2, 3, 1, 0), folded)
    assert torchs_offset == pytest.approx(offset, rel=1e-12)
    dense = rng.normal(0, 1, (3, 2))
    folded, offset = fold_following(bn, dense)
    assert (folded.shape, offset.shape) == ((3, 2), (2,))
    assert _error(x @ folded + offset, _plain(bn, x, -1) @ dense) < 1e-10


def test_a_following_kernel_of_a_half_is_rounded_once() -> None:
    """As for a preceding one: the sum over the inputs is float64's."""
    rng, bn = np.random.default_rng(4), _layer(64)
    kernel = rng.normal(0, 1, (64, 8)).astype(np.float16)
    gamma, beta, mean, variance = (w.astype(np.float64) for w in bn.get_weights())
    s = gamma / np.sqrt(variance + bn.epsilon)
    folded, offset = fold_following(bn, kernel)
    assert folded.tobytes() == (kernel.astype(np.float64) * s[:, None]).astype(np.float16).tobytes()
    assert offset == pytest.approx(((beta - s * mean) @ kernel.astype(np.float64)), rel=2.0**-11)


def test_what_does_not_fit_is_refused() -> None:
    """Shapes, axes and dtypes, with both sides in the text; and a layer that is not built."""
    bn = _layer(3)
    kernel = np.zeros((5, 3))
    for use in (fold, fold_following):
        with pytest.raises(ValueError, match="Layer 'fresh' has no state yet"):
            use(BatchNormalization(name="fresh"), kernel)
        with pytest.raises(ValueError, match=r"channel_axis=2 is out of bounds for a kernel of shape \(5, 3\)"):
            use(bn, kernel, channel_axis=2)
        with pytest.raises(ValueError, match="Expected a kernel of a float dtype, received dtype int64"):
            use(bn, kernel.astype(np.int64))
    with pytest.raises(
        ValueError, match=r"expected a kernel with 3 on axis 0 \(channel_axis\), received shape \(5, 3\)"
    ):
        fold(bn, kernel, channel_axis=0)
    with pytest.raises(
        ValueError, match=r"expected a kernel with 3 on axis 0 \(channel_axis\), received shape \(5, 3\)"
    ):
        fold_following(bn, kernel)
    with pytest.raises(ValueError, match=r"received channel_axis and output_axis both 1"):
        fold_following(bn, kernel, channel_axis=1)
    with pytest.raises(ValueError, match=r"output_axis=4 is out of bounds"):
        fold_following(bn, kernel, channel_axis=1, output_axis=4)
    with pytest.raises(ValueError, match=r"a bias of real numbers and shape \(3,\), received float64\(5,\)"):
        fold(bn, kernel, np.zeros(5))
    with pytest.raises(ValueError, match=r"a bias of real numbers and shape \(5,\), received complex128\(5,\)"):
        fold_following(bn, kernel.T, np.zeros(5, complex))


def test_results_that_are_not_finite_are_refused() -> None:
    """A value beyond the kernel's dtype, and statistics that are no numbers; no warning comes first."""
    bn = _layer(3, mean=1e5)
    with pytest.raises(
        ValueError, match=r"Layer 'bn': the folded bias is not finite in float16\. Look for NaN and Inf"
    ):
        fold(bn, np.ones((2, 3), np.float16))
    bn.moving_variance.assign([1, -1, 1])
    with pytest.raises(ValueError, match="the folded kernel is not finite in float32"):
        fold(bn, np.ones((2, 3), np.float32))
