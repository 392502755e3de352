"""Folding a layer in inference mode into the dense or convolution kernel beside it.

In inference mode the layer is an affine map per channel,

    BN(z) = s·(z − moving_mean) + β        s = γ/√(moving_variance + ε)

so a linear map before or after it can hold it, and the layer is not computed at all. Folded values are computed in
float64 and rounded once, to the kernel's dtype. Renorm, synchronization and momentum have no part in inference.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(2018), section 3.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.dtypes import is_real
from bnlayer.layer import BatchNormalization
from bnlayer.plain import plain_array
from bnlayer.variable import Variable

Wide = NDArray[np.float64]


def fold(
    layer: BatchNormalization, kernel: ArrayLike, bias: ArrayLike | None = None, *, channel_axis: int = -1
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The kernel and bias that compute BN(W·x + b) in one.

        W′ = s·W, along the output channels        b′ = s·(b − moving_mean) + β

    Args:
        layer: built; its channels are the kernel's output channels.
        kernel: W. Keras's Dense (in, out) and Conv (…, in, out) have `channel_axis=-1`, torch's Linear (out, in) and
            Conv (out, in, …) 0. Transposed convolutions: Keras's -2, torch's 1 (without groups).
        bias: b, (out,); None: 0.
        channel_axis: the kernel's axis of output channels.

    Returns:
        W′ and b′, new arrays of the kernel's dtype.

    Raises:
        ValueError: the layer is not built, a shape or dtype does not fit, or a result is not finite.
    """
    wide, axis, dtype = _kernel(kernel, channel_axis, "channel_axis")
    scale, mean, beta = _affine(layer)
    _check_channels(layer, wide, axis, "channel_axis")
    with np.errstate(over="ignore", invalid="ignore"):
        folded = wide * _along(scale, axis, wide.ndim)
        offset = (_bias(bias, mean.shape) - mean) * scale + beta
    return _rounded(layer, folded, dtype, "kernel"), _rounded(layer, offset, dtype, "bias")


def fold_following(
    layer: BatchNormalization,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    channel_axis: int = -2,
    output_axis: int = -1,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The kernel and bias that compute W·BN(x) + b in one.

        W′ = s·W, along the input channels        b′ = b + Σ W·(β − s·moving_mean), over all axes but the output's

    A convolution must not pad: zeros that were put in after the layer are not what it makes of zeros. With padding the
    result is right everywhere but at the border. A transposed convolution can't: its outputs see different parts of
    the kernel. Neither can a grouped one, whose input channels are not the kernel's.

    Args:
        layer: built; its channels are the kernel's input channels.
        kernel: W. Keras's Dense and Conv have `channel_axis=-2, output_axis=-1`, torch's Linear and Conv 1 and 0.
        bias: b, (out,); None: 0.
        channel_axis: the kernel's axis of input channels.
        output_axis: the kernel's axis of output channels.

    Returns:
        W′ and b′, new arrays of the kernel's dtype.

    Raises:
        ValueError: the layer is not built, a shape or dtype does not fit, or a result is not finite.
    """
    wide, axis, dtype = _kernel(kernel, channel_axis, "channel_axis")
    _, output, _ = _kernel(kernel, output_axis, "output_axis")
    if axis == output:
        raise ValueError(f"Expected two axes of the kernel, received channel_axis and output_axis both {axis}.")
    scale, mean, beta = _affine(layer)
    _check_channels(layer, wide, axis, "channel_axis")
    others = tuple(i for i in range(wide.ndim) if i != output)
    with np.errstate(over="ignore", invalid="ignore"):
        folded = wide * _along(scale, axis, wide.ndim)
        offset = (wide * _along(beta - scale * mean, axis, wide.ndim)).sum(axis=others)
        offset += _bias(bias, offset.shape)
    return _rounded(layer, folded, dtype, "kernel"), _rounded(layer, offset, dtype, "bias")


def _affine(layer: BatchNormalization) -> tuple[Wide, Wide, Wide]:
    """s, the moving mean and β, each (C,) float64."""
    moving = layer.state.moving
    mean, variance = moving.mean.astype(np.float64), moving.variance.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = _value(layer.gamma, np.ones(mean.shape)) / np.sqrt(variance + layer.epsilon)
    return scale, mean, _value(layer.beta, np.zeros(mean.shape))


def _value(variable: Variable | None, otherwise: Wide) -> Wide:
    return otherwise if variable is None else variable.value.astype(np.float64)


def _kernel(kernel: ArrayLike, axis: int, what: str) -> tuple[Wide, int, np.dtype[Any]]:
    """The kernel in float64, one of its axes counted from the front, and its dtype."""
    array = plain_array(kernel, "the kernel")
    if not is_real(array.dtype) or array.dtype.kind in "iub":
        raise ValueError(f"Expected a kernel of a float dtype, received dtype {array.dtype}.")
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"{what}={axis} is out of bounds for a kernel of shape {array.shape}.")
    return array.astype(np.float64), axis % array.ndim, array.dtype


def _check_channels(layer: BatchNormalization, kernel: Wide, axis: int, what: str) -> None:
    channels = layer.state.channels
    if kernel.shape[axis] != channels:
        raise ValueError(
            f"Layer {layer.name!r} has {channels} channels: expected a kernel with {channels} on axis {axis} ({what}), "
            f"received shape {kernel.shape}."
        )


def _bias(bias: ArrayLike | None, shape: tuple[int, ...]) -> Wide:
    if bias is None:
        return np.zeros(shape)
    array = plain_array(bias, "the bias")
    if array.shape != shape or not is_real(array.dtype):
        raise ValueError(f"Expected a bias of real numbers and shape {shape}, received {array.dtype}{array.shape}.")
    return array.astype(np.float64)


def _along(vector: Wide, axis: int, ndim: int) -> Wide:
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _rounded(layer: BatchNormalization, wide: Wide, dtype: np.dtype[Any], what: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        rounded = wide.astype(dtype)
    if not np.isfinite(rounded.astype(np.float64)).all():
        raise ValueError(
            f"Layer {layer.name!r}: the folded {what} is not finite in {dtype}. Look for NaN and Inf in the layer's "
            "weights, the kernel and the bias, or fold into a wider kernel."
        )
    return rounded
