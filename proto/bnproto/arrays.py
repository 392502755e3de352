"""Arrays on the wire: little-endian bytes beside dtype and shape, in messages below gRPC's limit.

Laws:
1. What `pack` cuts, `Joining` and `unpack` restore: same dtypes, shapes and bits.
2. Bytes that don't match their header are refused before an array is made of them.
3. A `bytes` field is read once: each access copies.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from bnproto.grpc_options import PART_BYTES
from bnproto.v1 import statistics_pb2 as pb

_KINDS: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
}
_KINDS["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
# The native dtypes where they are little-endian: one that says so is not what compiled kernels take.
_ON_THE_WIRE = _KINDS if sys.byteorder == "little" else {n: kind.newbyteorder("<") for n, kind in _KINDS.items()}
# `dtype.name` is computed at every access, and slower than everything else here: native dtypes are looked up.
_NAMES = {kind: name for name, kind in _KINDS.items()}


class WireError(ValueError):
    """A message is invalid."""


def payload_of(arrays: Iterable[NDArray[Any]], names: Sequence[str] = ()) -> pb.Payload:
    """Arrays as one payload, however large: for files, which know no limit.

    Args:
        arrays: of any dtype that travels, C-contiguous or not.
        names: one for each array; empty for arrays whose order says enough.

    Raises:
        WireError: a dtype doesn't travel.
    """
    return pack(arrays, names, part_bytes=sys.maxsize)[0]


def pack(
    arrays: Iterable[NDArray[Any]], names: Sequence[str] = (), part_bytes: int = PART_BYTES
) -> tuple[pb.Payload, list[pb.Part]]:
    """Arrays as a payload and the parts that follow its message on the wire.

    Args:
        arrays: of any dtype that travels, C-contiguous or not.
        names: one for each array; empty for arrays whose order says enough.
        part_bytes: that one message may carry.

    Raises:
        WireError: a dtype doesn't travel.
    """
    arrays = list(arrays)
    headers, parts = [], []
    for name, array in zip(names or [""] * len(arrays), arrays, strict=True):
        dtype = _NAMES.get(array.dtype) or _name_of(array)
        headers.append(pb.Array(name=name, dtype=dtype, shape=array.shape))
        parts.append(array.astype(_ON_THE_WIRE[dtype], copy=False).tobytes())
    data = b"".join(parts)
    size = len(data)
    payload = pb.Payload(arrays=headers, data=data[:part_bytes], size=size)
    return payload, [pb.Part(data=data[start : start + part_bytes]) for start in range(part_bytes, size, part_bytes)]


def unpack(payload: pb.Payload, data: bytes | bytearray) -> list[NDArray[Any]]:
    """The arrays of a payload; views of `data`, read-only if it is `bytes`.

    Args:
        payload: the headers.
        data: all its bytes: see `Joining`.

    Raises:
        WireError: an unknown dtype, or headers and bytes that don't match.
    """
    arrays, start = [], 0
    for header in payload.arrays:
        kind = _KINDS.get(header.dtype)
        if kind is None:
            raise WireError(f"expected arrays of {', '.join(_KINDS)}; received {header.dtype!r}")
        shape = tuple(header.shape)
        size = math.prod(shape)
        stop = start + size * kind.itemsize
        if stop > len(data):
            raise WireError(f"expected {stop} bytes or more for the arrays named, received {len(data)}")
        flat = np.frombuffer(data, _ON_THE_WIRE[header.dtype], size, start)
        arrays.append(flat.astype(kind, copy=False).reshape(shape))
        start = stop
    if start != len(data):
        raise WireError(f"expected {start} bytes for the arrays named, received {len(data)}")
    return arrays


def named(payload: pb.Payload, data: bytes | bytearray) -> dict[str, NDArray[Any]]:
    """The arrays of a payload by name."""
    return {header.name: array for header, array in zip(payload.arrays, unpack(payload, data), strict=True)}


class PayloadAssembler:
    """Collects the bytes of a payload whose parts arrive one by one."""

    def __init__(self, payload: pb.Payload) -> None:
        self.payload = payload
        self._size = payload.size
        self._first = payload.data
        self._bytes = bytearray()
        self._check(len(self._first))

    @property
    def complete(self) -> bool:
        """Whether all bytes are there."""
        return max(len(self._first), len(self._bytes)) == self._size

    @property
    def data(self) -> bytes | bytearray:
        """The bytes so far."""
        return self._bytes or self._first

    def add(self, part: pb.Part) -> None:
        """Append a part.

        Raises:
            WireError: it brings none, or more than were announced.
        """
        data = part.data
        if not data:
            raise WireError("expected a part with data, received an empty one")
        if not self._bytes:
            self._bytes += self._first
        self._bytes += data
        self._check(len(self._bytes))

    def _check(self, received: int) -> None:
        if received > self._size:
            raise WireError(f"expected a payload of {self._size} bytes, received {received}")


def _name_of(array: NDArray[Any]) -> str:
    """NumPy's name of a dtype that is not one of ours in native byte order."""
    name = array.dtype.name
    if name not in _KINDS:
        raise WireError(f"expected arrays of {', '.join(_KINDS)}; received {name!r}")
    return name
