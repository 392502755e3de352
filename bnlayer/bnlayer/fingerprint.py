"""Short names of arrays: equal arrays have equal names on every machine, others as good as never."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digest(data: bytes, size: int = 8) -> bytes:
    """BLAKE2b of some bytes, `size` of them."""
    from hashlib import blake2b  # loads OpenSSL, 4 ms of a start: a process by itself mostly has nothing to hash

    return blake2b(data, digest_size=size).digest()


def fingerprint(arrays: Mapping[str, NDArray[Any]]) -> int:
    """A hash of named arrays, from 1 to 2^63 − 1: of their names, dtypes, shapes and bits."""
    parts: list[bytes] = []
    for name, array in arrays.items():
        parts.append(f"{name} {array.dtype.name} {array.shape};".encode())
        parts.append(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).tobytes())
    return (int.from_bytes(digest(b"".join(parts)), "little") >> 1) or 1
