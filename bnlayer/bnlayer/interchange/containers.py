"""The two containers: contents to bytes and back, nothing pickled.

| container | arrays | description |
|---|---|---|
| safetensors | tensors | metadata entry `bnlayer` |
| `.npz` | entries of a zip archive; bfloat16 as its bits, in uint16 | a string array `bnlayer` |
"""

from __future__ import annotations

import io
import json
import tokenize
import zipfile
import zlib
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from bnlayer.dtypes import dtype_named
from bnlayer.interchange.contents import Arrays, Contents

_DESCRIPTION = "bnlayer"
# What zipfile raises for what is no archive, is cut off or damaged, or uses what NumPy's archives don't.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, RuntimeError, ValueError)
# What NumPy raises for an entry that is no array: its header is parsed as Python's tokens.
_MALFORMED = (ValueError, EOFError, MemoryError, OverflowError, SyntaxError, TypeError, tokenize.TokenError)
_TENSOR_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
# How the weights of a batch normalization are named without a description, and what makes a layer of them.
_WEIGHTS = (
    ("running_mean", "torch's", "from_torch(arrays, prefix={layer!r}, ndim=…, eps=…)"),
    (
        "/moving_mean",
        "Keras's",
        "from_keras([arrays[f'{layer}/{{weight}}'] for weight in ('gamma', 'beta', …)], config, ndim=…)",
    ),
)


class Container(Protocol):
    """A way to write contents as bytes."""

    def encode(self, contents: Contents) -> bytes:
        """The bytes of a file."""

    def decode(self, data: bytes) -> Contents:
        """What a file's bytes hold.

        Raises:
            ValueError: they are not of this container, damaged, or without a description.
        """


class Safetensors:
    """https://huggingface.co/docs/safetensors."""

    def encode(self, contents: Contents) -> bytes:
        """The bytes of a file."""
        tensors = {key: np.ascontiguousarray(array) for key, array in contents.arrays.items()}
        return safetensors.numpy.save(tensors, metadata={_DESCRIPTION: contents.description})

    def decode(self, data: bytes) -> Contents:
        """What a file's bytes hold; see `Container`."""
        tensors, metadata = _parsed(data)
        if _DESCRIPTION not in metadata:
            raise ValueError(_without_description("metadata", list(metadata), [key for key, _ in tensors]))
        return Contents({key: _tensor(key, spec) for key, spec in tensors}, metadata[_DESCRIPTION])


class Npz:
    """NumPy's archive of arrays."""

    def encode(self, contents: Contents) -> bytes:
        """The bytes of a file."""
        bfloat16 = dtype_named("bfloat16")
        arrays: Arrays = {_DESCRIPTION: np.array(contents.description)}
        for key, array in contents.arrays.items():
            arrays[key] = array.view(np.uint16) if array.dtype == bfloat16 else array
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for key, array in arrays.items():
                entry = io.BytesIO()
                np.lib.format.write_array(entry, array, allow_pickle=False)
                # A ZipInfo of our own has no time of day: the same layers give the same bytes.
                archive.writestr(zipfile.ZipInfo(f"{key}.npy"), entry.getvalue())
        return buffer.getvalue()

    def decode(self, data: bytes) -> Contents:
        """What a file's bytes hold; see `Container`."""
        arrays = _npz_arrays(data)
        description = arrays.pop(_DESCRIPTION, None)
        if description is None or description.dtype.kind != "U" or description.shape != ():
            raise ValueError(_without_description("a string", list(arrays), list(arrays)))
        return Contents(arrays, str(description))


def arrays_in(suffix: str, data: bytes) -> tuple[Arrays, str | None]:
    """The arrays of any file of the two kinds, and its description; None where it has none.

    Raises:
        ValueError: it is damaged, or holds something else than arrays.
    """
    if suffix == ".npz":
        arrays = _npz_arrays(data)
        description = arrays.pop(_DESCRIPTION, None)
        return arrays, None if description is None else str(description)
    tensors, metadata = _parsed(data)
    return {key: _tensor(key, spec) for key, spec in tensors}, metadata.get(_DESCRIPTION)


def _parsed(data: bytes) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, str]]:
    """The tensors of a safetensors file as they are stored, and its metadata."""
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]  # its stub has no annotations
    except safetensors.SafetensorError as error:
        raise ValueError(f"expected a whole safetensors file, received {len(data)} bytes: {error}.") from error
    # Valid by now: 8 bytes that give the length of the header, and the header.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})


def _npz_arrays(data: bytes) -> Arrays:
    """The arrays of a .npz."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # Each entry is read whole before it is parsed, so that its checksum comes first.
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except _UNREADABLE as error:
        raise ValueError(f"expected a whole .npz archive, received {len(data)} bytes: {error}.") from error
    return {name.removesuffix(".npy"): _member(name, member) for name, member in members.items()}


def _tensor(key: str, spec: dict[str, Any]) -> NDArray[Any]:
    name = _TENSOR_DTYPES.get(spec["dtype"])
    if name is None:
        raise ValueError(f"expected tensor {key!r} of {', '.join(_TENSOR_DTYPES)}, received {spec['dtype']}.")
    return np.frombuffer(spec["data"], dtype_named(name)).reshape(spec["shape"])


def _member(name: str, data: bytes) -> NDArray[Any]:
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except _MALFORMED as error:
        raise ValueError(f"expected entry {name!r} to be an array of numbers or text: {error}") from error


def _without_description(where: str, received: list[str], arrays: list[str]) -> str:
    held = ", ".join(received[:8]) or "nothing"
    expected = f"expected {where} {_DESCRIPTION!r} that describes layers, received {held}: "
    for end, whose, use in _WEIGHTS:
        layer = next((name.removesuffix(end) for name in arrays if name.endswith(end)), None)
        if layer is not None:
            return (
                f"{expected}weights alone, in {whose} names (as of `bnlayer export`), which don't say a layer's axis "
                f"and epsilon. Read the arrays with numpy.load or safetensors.numpy.load_file, and pass them to "
                f"interchange.{use.format(layer=layer)}; or export a checkpoint with --names bnlayer."
            )
    return f"{expected}another program's file."


CONTAINERS: dict[str, Container] = {".safetensors": Safetensors(), ".npz": Npz()}
