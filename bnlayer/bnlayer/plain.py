"""Users' arrays as NumPy's own, the one way in: arrays that mean more than their numbers are refused by name.

`np.asarray` takes the numbers of a masked array, a quantity with a unit or a nullable column, and drops the rest
without a word: a mean over masked values, a sum of metres and feet. No library is imported to know its types: they are
told by what they do.

Taken are NumPy's arrays and scalars, `np.memmap` and other subclasses that calculate as an array does (`np.matrix` too:
its numbers are those of a two-dimensional array), numbers and nested lists of them, and whatever else converts without
losing more than labels: tensors, data frames of NumPy's dtypes, labelled arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_NUMBERS = frozenset((bool, int, float, np.float64, np.float32, np.int64, np.ndarray))
_DEEPEST = 64  # dimensions of an array

_MASKED = (
    "its mask would be lost. Pass its .data, and the positions that count as mask=, "
    "e.g. ~np.ma.getmaskarray(x).any(axis=-1); or x.filled(value)"
)
_OWN_ARITHMETIC = (
    "its unit, mask or other meaning would be lost. Pass its numbers, e.g. x.value or x.view(np.ndarray), in one unit"
)
_UNIT = "its unit would be lost. Pass its numbers, e.g. x.magnitude or x.value, in one unit"
_GRAPH = "torch would not know of its gradients. Pass x.detach()"
_SPARSE = "it is sparse. Pass x.toarray()"
_EXTENSION = (
    "its missing values or categories would be lost. Pass x.to_numpy(dtype=float, na_value=0), and the rows that count "
    "as mask="
)


def plain_array(value: ArrayLike, what: str) -> NDArray[Any]:
    """A user's value as an array: the same one where it is NumPy's own, otherwise a new one or a view.

    Args:
        value: what was given.
        what: how to call it in an error.

    Raises:
        TypeError: it means more than its numbers; the text says what would be lost, and what to pass.
    """
    if type(value) is np.ndarray:
        return value
    _check(value, what, 0)
    return np.asarray(value)


def _check(value: object, what: str, depth: int) -> None:
    if isinstance(value, list | tuple) and depth < _DEEPEST:
        for each in value:
            if type(each) not in _NUMBERS:
                _check(each, what, depth + 1)
        return
    why = _refusal(value)
    if why is not None:
        kind = type(value)
        raise TypeError(f"Expected {what} as a plain array, received a {kind.__module__}.{kind.__qualname__}: {why}.")


def _refusal(value: object) -> str | None:
    """Why a value can't be taken for its numbers, and what to do; None if it can."""
    kind: type[Any] = type(value)
    if isinstance(value, np.ma.MaskedArray):
        return _MASKED
    if isinstance(value, np.ndarray):
        return None if kind.__array_ufunc__ is np.ndarray.__array_ufunc__ else _OWN_ARITHMETIC
    if any(base.__module__.partition(".")[0] == "pandas" for base in kind.__mro__):
        dtypes: Any = getattr(value, "dtypes", getattr(value, "dtype", None))
        each = [dtypes] if isinstance(dtypes, np.dtype) or not hasattr(dtypes, "__iter__") else dtypes
        return None if all(isinstance(dtype, np.dtype) for dtype in each) else _EXTENSION
    if hasattr(kind, "units") or hasattr(kind, "unit"):
        return _UNIT
    if getattr(value, "requires_grad", False) is True:
        return _GRAPH
    if hasattr(kind, "toarray") and hasattr(kind, "nnz"):
        return _SPARSE
    return None
