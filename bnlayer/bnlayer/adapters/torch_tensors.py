"""Tensors as the layer takes them: in their own memory, (A, C, B), whichever memory format and device they have.

Shape suffixes: A axes before the channels, C channels, B axes after them.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from bnlayer.adapters.torch_passes import DeviceView
from bnlayer.view import View

HALF = (torch.float16, torch.bfloat16)
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def layout_of(x: Any) -> Any:
    """The memory format in which a batch is taken: the one it has, or else the contiguous one."""
    last = _LAYOUTS.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def flattened(x: Any, layout: Any) -> Any:
    """A tensor as (A, C, B), without a copy where it has the memory format: an array, or on a device a tensor."""
    if not x.is_contiguous(memory_format=layout):
        x = x.contiguous(memory_format=layout)
    flat, channels = array_of(x) if _on_host(x) else x.detach(), x.shape[1]
    if layout is torch.contiguous_format:
        return flat.reshape(x.shape[0], channels, x.shape[2:].numel())
    return _last(flat).reshape(-1, channels, 1)


def _last(x: Any) -> Any:
    """With the channels' axis behind the others."""
    return np.moveaxis(x, 1, -1) if isinstance(x, np.ndarray) else x.movedim(1, -1)


def _on_host(x: Any) -> bool:
    """Whether a batch is computed on by the host's kernels: also where its device has no float64."""
    return bool(x.is_cpu or x.is_mps)


def view_of(x: Any, mask: Any, layout: Any) -> View:
    """A batch and its mask as the layer takes them.

    Raises:
        ValueError: the mask has not the shape of the batch without its channels.
    """
    flat = flattened(x, layout)
    if mask is not None:
        if tuple(mask.shape) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                "The mask provided should have the shape of the input without its channels. "
                f"Received: mask.shape={tuple(mask.shape)}, input.shape={tuple(x.shape)}"
            )
        mask = mask.detach().to(torch.bool).contiguous()
        if layout is torch.contiguous_format:
            mask = mask.view(flat.shape[0], 1, flat.shape[2]).expand(flat.shape).contiguous()
        else:
            mask = mask.view(-1, 1, 1)
        mask = mask.cpu().numpy() if isinstance(flat, np.ndarray) else mask
    kind = View if isinstance(flat, np.ndarray) else DeviceView
    return kind(flat, mask, tuple(flat.shape))


def restored(flat: Any, x: Any, layout: Any) -> Any:
    """The way back from `flattened`, to a batch's shape, memory format and device."""
    if layout is torch.contiguous_format:
        y = tensor_of(flat.reshape(x.shape))
    else:
        y = tensor_of(flat.reshape(x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return y if y.device == x.device else y.to(x.device)


def array_of(tensor: Any) -> NDArray[Any]:
    """A tensor's own memory as an array; a copy of one on another device."""
    tensor = tensor.detach()
    if not tensor.is_cpu:
        tensor = tensor.cpu()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)
        bits: NDArray[Any] = tensor.numpy()
        return bits.view(_BFLOAT16)
    array: NDArray[Any] = tensor.numpy()
    return array


def tensor_of(array: Any) -> Any:
    """An array's own memory as a tensor; a tensor as it is."""
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
