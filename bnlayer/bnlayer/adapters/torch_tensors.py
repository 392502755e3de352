"""Tensors as the layer takes them: in their own memory, (A, C, B), whichever memory format and device they have.

Shape suffixes: A axes before the channels, C channels, B axes after them.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from bnlayer.adapters.torch_passes import DeviceView
from bnlayer.view import View, flat_shape

HALF = (torch.float16, torch.bfloat16)
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
_FLOAT32, _BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def layout_of(x: Any) -> Any:
    """The memory format in which a batch is taken: the one it has, or else the contiguous one."""
    last = _LAYOUTS.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def flattened(x: Any, layout: Any) -> Any:
    """A tensor as (A, C, B), without a copy where it has the memory format: an array, or on a device a tensor."""
    if layout is torch.contiguous_format:
        x = x.contiguous()  # the same tensor, where it is
        flat = array_of(x) if _on_host(x) else x.detach()
        return flat.reshape(flat_shape(flat.shape, 1))
    if not x.is_contiguous(memory_format=layout):
        x = x.contiguous(memory_format=layout)
    flat = array_of(x) if _on_host(x) else x.detach()
    return _last(flat).reshape(-1, flat.shape[1], 1)


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
    if mask is None and isinstance(flat, np.ndarray):
        return View(flat, None, flat.shape)
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
    if tensor.dtype is torch.bfloat16:
        bits: NDArray[Any] = tensor.detach().view(torch.int16).numpy(force=True)
        return bits.view(_BFLOAT16)
    array: NDArray[Any] = tensor.numpy(force=True)
    return array


class Contents:
    """Some tensors of a module as arrays of their own memory, made anew where a tensor was replaced or lies elsewhere.

    To make the arrays of a normalization's tensors takes 8 µs, a third of what torch's own takes for a small batch; to
    see that they are where they were, 1 µs. What was made holds the memory, so nothing else can lie at its address.
    """

    def __init__(self) -> None:
        self._tensors: tuple[Any, ...] = ()
        self._addresses: list[int | None] = []
        self._arrays: list[NDArray[Any] | None] = []

    def arrays(self, *tensors: Any) -> list[NDArray[Any] | None]:
        """An array for each tensor: its own memory, or a copy of one that is not on the CPU; None for None."""
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        if addresses != self._addresses or not all(map(is_, tensors, self._tensors)):
            self._tensors, self._addresses = tensors, addresses
            self._arrays = [None if tensor is None else array_of(tensor) for tensor in tensors]
            if not all(tensor is None or tensor.is_cpu for tensor in tensors):
                self._addresses = []  # of copies, which are made each time
        return self._arrays


def tensor_of(array: Any) -> Any:
    """An array's own memory as a tensor; a tensor as it is."""
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype is not _FLOAT32 and array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
