"""Arrays as the extension module takes them: by the buffer protocol, which knows no bfloat16.

Shape suffixes: A axes before the channels, C channels, B axes after them.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def plain(x: Array) -> Array:
    """A batch as the module takes it: in one piece, and of a dtype that has a buffer."""
    if not (x.flags.c_contiguous and x.flags.aligned):
        x = np.require(x, requirements=["C", "A"])
    return x.view(np.uint16) if x.dtype == BFLOAT16 else x


def fitting(mask: Mask, x: Array) -> Mask:
    """A mask of a form that the module takes: (A, 1, 1) for channels in the last axis, or (A, C, M)."""
    if mask is None:
        return None
    a, c, b = x.shape
    rows = mask.shape == (a, 1, 1) and b == 1
    elements = mask.shape[:2] == (a, c) and (mask.shape[2] == b or (mask.shape[2] > 0 and b % mask.shape[2] == 0))
    return np.ascontiguousarray(mask if rows or elements else np.broadcast_to(mask, x.shape))
