"""The layer's dtype policy, and what it makes of an input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_SUPPORTED = ("float32", "float64")


def policy_name(dtype: Any) -> str:
    """The name of a dtype policy.

    Args:
        dtype: None (float32), a name, a NumPy dtype, or Keras's configuration of a policy.

    Raises:
        ValueError: the policy is not supported; half precision and the mixed policies are not yet.
    """
    if dtype is None:
        return "float32"
    if isinstance(dtype, Mapping):
        dtype = dtype.get("config", {}).get("name")
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None)
    if name is None and isinstance(dtype, type) and issubclass(dtype, np.generic):
        name = np.dtype(dtype).name
    if name not in _SUPPORTED:
        raise ValueError(
            f"Expected dtype 'float32' or 'float64', received {dtype!r}. "
            "Half precision and mixed policies are not supported by this version."
        )
    return str(name)


def policy_config(name: str) -> dict[str, Any]:
    """Keras's serialized form of a policy."""
    return {"module": "keras", "class_name": "DTypePolicy", "config": {"name": name}, "registered_name": None}


def as_compute(x: ArrayLike, name: str, what: str) -> NDArray[Any]:
    """An input as an array of the compute dtype; the same array where it is one already.

    Args:
        x: numbers of any real dtype.
        name: the compute dtype.
        what: what to call it in an error.

    Raises:
        TypeError: the values are not real numbers.
    """
    array = np.asarray(x)
    # Kind V is how NumPy sees the half types of ml_dtypes; those convert exactly.
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise TypeError(f"Expected {what} of a real dtype, received dtype {array.dtype}.")
    with np.errstate(over="ignore"):
        return array.astype(name, copy=False)
