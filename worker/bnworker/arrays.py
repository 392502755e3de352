"""Arrays that users give to plain operations: what is refused before anything is sent, and how large they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.plain import plain_array
from bnlayer.reduction import refusal


def size(arrays: Iterable[NDArray[Any]]) -> int:
    """Of all together, in bytes."""
    return sum(array.nbytes for array in arrays)


def reducible(function: str, arrays: Iterable[ArrayLike], op: str) -> list[NDArray[Any]]:
    """The arrays that `function` was given, contiguous and in native byte order.

    Raises:
        TypeError: an array's dtype is refused, or there is one array instead of a list.
    """
    if isinstance(arrays, np.ndarray | str | bytes) or not isinstance(arrays, Iterable):
        received = f"one of dtype {arrays.dtype}" if isinstance(arrays, np.ndarray) else type(arrays).__name__
        raise TypeError(f"{function}(arrays): expected a list of arrays, received {received}; write [x].")
    checked = []
    for index, given in enumerate(arrays):
        array = plain_array(given, f"array {index} of {function}(arrays)")
        why = refusal(op, array.dtype)
        if why is not None:
            raise TypeError(f"{function}(arrays): array {index}: {why}.")
        checked.append(np.asarray(array, array.dtype.newbyteorder("="), order="C"))
    return checked
