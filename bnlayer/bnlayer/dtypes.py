"""Keras's dtype policies: which dtype variables have, which one data travels in, and which one is computed in.

| policy | variables | inputs and outputs | arithmetic |
|---|---|---|---|
| float32, float64 | the same | the same | the same |
| float16, bfloat16 | the same | the same | float32 |
| mixed_float16, mixed_bfloat16 | float32 | float16, bfloat16 | float32 |

Statistics are float64 from exact sums in every case; half inputs convert to float32 without a rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.plain import plain_array

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_POLICIES = ("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
# A dtype that is looked up by its name is looked up again at each access of the name, which takes a microsecond.
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("float16", "float32", "float64")} | {
    "bfloat16": _BFLOAT16
}
_COMPUTE: dict[str, np.dtype[Any]] = {name: _DTYPES[name.removeprefix("mixed_")] for name in _POLICIES}


def dtype_named(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a name, bfloat16 included."""
    return _BFLOAT16 if name == "bfloat16" else np.dtype(name)


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether values of a dtype are real numbers: floats, integers or bools."""
    return dtype.kind in "fiub" or dtype == _BFLOAT16


def rounded(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values in another dtype, rounded once.

    NumPy casts float64 to bfloat16 by way of float32, which rounds a near-tie twice. Rounding to odd on the way (the
    last bit of an inexact float32 is set) keeps what the second rounding must know.

    Source: Boldo and Melquiond, "Emulation of a FMA and Correctly Rounded Sums" (2008), for rounding to odd.
    """
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore", invalid="ignore"):
        return cast(x, dtype)


def cast(x: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """As `rounded`, for callers that have NumPy's floating-point warnings off already: it takes them a microsecond."""
    if dtype != _BFLOAT16 or x.dtype != np.float64:
        return x.astype(dtype, copy=False)
    single = x.astype(np.float32)
    toward_zero = np.where(np.abs(single) > np.abs(x), np.nextafter(single, np.float32(0)), single)
    inexact = (toward_zero != x) & np.isfinite(x)
    odd = (toward_zero.view(np.int32) | inexact.astype(np.int32)).view(np.float32)
    return np.where(np.isfinite(x), odd, single).astype(dtype)


@dataclass(frozen=True, slots=True)
class Policy:
    """A dtype policy.

    Attributes:
        name: as Keras names it.
    """

    name: str

    @classmethod
    def of(cls, dtype: Any) -> Policy:
        """The policy that a value names.

        Args:
            dtype: None (float32), a name, a NumPy dtype, a Keras policy or its configuration.

        Raises:
            ValueError: there is no such policy.
        """
        if dtype is None:
            return cls("float32")
        named = dtype.get("config", {}).get("name") if isinstance(dtype, Mapping) else dtype
        name = named if isinstance(named, str) else getattr(named, "name", None)
        if name is None and isinstance(named, type) and issubclass(named, np.generic):
            name = np.dtype(named).name
        if name not in _POLICIES:
            raise ValueError(f"Expected a dtype policy, one of {', '.join(_POLICIES)}; received {dtype!r}.")
        return cls(name)

    @property
    def variable_dtype(self) -> np.dtype[Any]:
        """Of gamma, beta and the moving statistics."""
        return _DTYPES["float32" if self.name.startswith("mixed_") else self.name]

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """Of what comes in, once cast, and of what goes out."""
        return _COMPUTE[self.name]

    @property
    def arithmetic(self) -> str:
        """In which each element is normalized: "float32" or "float64"."""
        return "float64" if self.name == "float64" else "float32"

    @property
    def arithmetic_dtype(self) -> np.dtype[Any]:
        """NumPy's dtype of the arithmetic."""
        return _DTYPES[self.arithmetic]

    def get_config(self) -> dict[str, Any]:
        """Keras's serialized form."""
        return {
            "module": "keras",
            "class_name": "DTypePolicy",
            "config": {"name": self.name},
            "registered_name": None,
        }

    def received(self, x: ArrayLike, what: str) -> NDArray[Any]:
        """Data as the passes take it: rounded to the compute dtype.

        Integers are no rounding's business: they go to the arithmetic's dtype straight, as in Keras.

        Args:
            x: real numbers.
            what: what to call it in an error.

        Raises:
            TypeError: the values are not real numbers, or an array of a kind whose meaning would be lost.
        """
        if type(x) is np.ndarray and x.dtype is _COMPUTE[self.name]:  # nearly always, at every call
            return x
        array = plain_array(x, what)
        if not is_real(array.dtype):
            raise TypeError(f"Expected {what} of a real dtype, received dtype {array.dtype}.")
        if array.dtype.kind in "iub":
            return array.astype(self.arithmetic)
        return rounded(array, self.compute_dtype)
