"""Plain reductions of arrays, such as gradients and metrics: what a sum, maximum or minimum over ranks is.

Laws:
1. Integers are added exactly, as pairs (hi, lo) of int64 limbs. A total that its dtype can't hold is an
   OverflowError.
2. Floats are added in float64, and rounded once to the dtype they came in. Their sum is in rank order.
3. Maxima and minima are those of ordered integers (−0 < +0), so no order matters. A NaN anywhere is the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bnlayer.dtypes import rounded
from bnlayer.limbs import LOW, carried
from bnlayer.precision import DOUBLE

OPS = ("sum", "max", "min")
FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

_NAN_KEY = 2**63 - 1  # above the key of +Inf, so that a MAX keeps it
_TOP_BIT = np.uint64(2**63)  # turns the order of uint64 into that of int64


@dataclass(frozen=True, eq=False)
class Encoded:
    """What one rank, or the sum of several, has to say; the arrays one after the other.

    Attributes:
        floats: float64; sums of floats.
        limbs: int64; sums of integers as all hi, then all lo limbs, per array; or keys of maxima and minima.
    """

    floats: NDArray[np.float64]
    limbs: NDArray[np.int64]


def refusal(op: str, dtype: np.dtype[Any]) -> str | None:
    """Why arrays of a dtype can't be reduced, as text; None if they can."""
    if dtype.name in FLOATS or dtype.name in INTEGERS or (dtype == np.bool_ and op != "sum"):
        return None
    if dtype == np.bool_:
        return "received bool for op='sum': a sum of truths is a count; cast to an integer dtype first"
    return f"expected one of {', '.join((*FLOATS, *INTEGERS))}, or bool for max and min; received {dtype.name}"


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype that `dtype.name` gave a name to.

    Raises:
        TypeError: the name is none that can be reduced.
    """
    if name in FLOATS or name in INTEGERS or name == "bool":
        return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    raise TypeError(f"Expected one of {', '.join((*FLOATS, *INTEGERS))} or bool, received {name!r}.")


def reduce_in_rank_order(op: str, arrays_by_rank: Sequence[Sequence[NDArray[Any]]]) -> list[NDArray[Any]]:
    """Reduce the arrays of all ranks, rank 0 first: the same bits on every machine.

    Args:
        op: "sum", "max" or "min".
        arrays_by_rank: per rank the same number of arrays, of the same dtypes and shapes.

    Returns:
        New arrays of these dtypes and shapes.

    Raises:
        OverflowError: an integer total does not fit its dtype.
    """
    first, *others = arrays_by_rank
    total = encode(op, first)
    for arrays in others:
        total = combined(op, total, encode(op, arrays))
    return decode(op, total, first)


def encode(op: str, arrays: Sequence[NDArray[Any]]) -> Encoded:
    """One rank's arrays as terms, which `combined`, or an MPI library, reduces."""
    floats: list[NDArray[np.float64]] = []
    limbs: list[NDArray[np.int64]] = []
    for array in arrays:
        flat = array.reshape(-1)
        if op != "sum":
            limbs.append(_keys(op, flat))
        elif _is_float(flat.dtype):
            floats.append(flat.astype(np.float64))
        else:
            limbs.extend(_pair(flat))
    return Encoded(
        np.concatenate(floats) if floats else np.empty(0, np.float64),
        np.concatenate(limbs) if limbs else np.empty(0, np.int64),
    )


def combined(op: str, a: Encoded, b: Encoded) -> Encoded:
    """The terms of a, then b."""
    with np.errstate(over="ignore", invalid="ignore"):  # Inf and NaN are answers here
        floats = a.floats + b.floats
    return Encoded(floats, a.limbs + b.limbs if op == "sum" else np.maximum(a.limbs, b.limbs))


def decode(op: str, total: Encoded, like: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The reduced arrays, from the terms of all ranks.

    Args:
        op: "sum", "max" or "min".
        total: the combined terms.
        like: one rank's arrays, for their dtypes and shapes.

    Raises:
        OverflowError: an integer total does not fit its dtype.
    """
    results: list[NDArray[Any]] = []
    at_float = at_limb = 0
    for index, array in enumerate(like):
        n = array.size
        if op == "sum" and _is_float(array.dtype):
            with np.errstate(over="ignore", invalid="ignore"):
                flat = rounded(total.floats[at_float : at_float + n], array.dtype)
            at_float += n
        elif op == "sum":
            hi, lo = total.limbs[at_limb : at_limb + n], total.limbs[at_limb + n : at_limb + 2 * n]
            flat = _integers(hi, lo, array.dtype, index)
            at_limb += 2 * n
        else:
            flat = _values(op, total.limbs[at_limb : at_limb + n], array.dtype)
            at_limb += n
        results.append(flat.reshape(array.shape))
    return results


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.name in FLOATS


def _keys(op: str, flat: NDArray[Any]) -> NDArray[np.int64]:
    """Integers whose MAX is the key of the result."""
    if _is_float(flat.dtype):
        wide = flat.astype(np.float64)
        keys = DOUBLE.key(wide)
        return np.where(np.isnan(wide), _NAN_KEY, ~keys if op == "min" else keys)
    keys = (flat ^ _TOP_BIT).view(np.int64) if flat.dtype == np.uint64 else flat.astype(np.int64)
    return ~keys if op == "min" else keys


def _values(op: str, keys: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The way back from `_keys`."""
    ordered = ~keys if op == "min" else keys
    if _is_float(dtype):
        return np.where(keys == _NAN_KEY, np.nan, DOUBLE.unkey(ordered)).astype(dtype)
    return ordered.view(np.uint64) ^ _TOP_BIT if dtype == np.uint64 else ordered.astype(dtype)


def _pair(flat: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The limbs hi and lo of integers: x = hi * 2^32 + lo, 0 <= lo < 2^32."""
    wide = flat if flat.dtype == np.uint64 else flat.astype(np.int64)
    kind = wide.dtype.type
    return (wide >> kind(32)).astype(np.int64), (wide & kind(LOW)).astype(np.int64)


def _integers(hi: NDArray[np.int64], lo: NDArray[np.int64], dtype: np.dtype[Any], index: int) -> NDArray[Any]:
    """The way back from a sum of `_pair`s."""
    hi, lo = carried(hi, lo)
    limits = np.iinfo(dtype)
    low, high = int(limits.min), int(limits.max)
    outside = (hi < low >> 32) | (hi > high >> 32)
    if dtype.itemsize < 8:
        outside = outside | ~((hi * 2**32 + lo >= low) & (hi * 2**32 + lo <= high))
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        value = (int(hi[at]) << 32) + int(lo[at])
        raise OverflowError(
            f"allreduce(op='sum'): array {index}, element {at}: the sum over the ranks is {value}, "
            f"and {dtype.name} holds {low} to {high}. Sum in a wider dtype."
        )
    if dtype == np.uint64:
        return (hi.astype(np.uint64) << np.uint64(32)) | lo.astype(np.uint64)
    return (hi * 2**32 + lo).astype(dtype)
