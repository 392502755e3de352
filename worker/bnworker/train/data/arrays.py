"""Arrays whose rows are read when they are needed.

An array of a .npy file or of an uncompressed .npz is left in its file. The rows of a compressed array, or of one in
Fortran order, are not contiguous in the file: such an array is read once and kept in memory. Arrays of Python objects
are pickles, which are never loaded.

Shape suffixes: N rows, D columns, B rows of one read.
"""

from __future__ import annotations

import io
import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bnworker.train.data.batches import Indices
from bnworker.train.data.files import File, read_into
from bnworker.train.data.problem import DataError

_HEADER_AT_MOST = 16_384  # NumPy itself refuses headers above 10,000 bytes
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip's member: the lengths of its name and its extra field
_ENCRYPTED = 1  # the bit of a zip member's flags
# What `zipfile` and its decompressors raise for damaged files.
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, ValueError)


class Array(Protocol):
    """Rows of numbers."""

    @property
    def where(self) -> str:
        """The file, for messages."""

    @property
    def key(self) -> str:
        """Its name: "x", "y", "x_test" or "y_test"."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored; the first axis is that of the rows."""

    def rows(self, indices_B: Indices) -> NDArray[Any]:
        """Some rows, (B, D), of the stored dtype.

        Raises:
            DataError: they cannot be read, or the file was changed.
        """

    def soon(self, indices_B: Indices) -> None:
        """Let the system prefetch rows that will be read soon."""


@dataclass(frozen=True, eq=False)
class Held:
    """An array in memory, and the file that it was read from, if any."""

    where: str
    key: str
    array_ND: NDArray[Any]
    shape: tuple[int, ...]
    file: File | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return self.array_ND.dtype

    def rows(self, indices_B: Indices) -> NDArray[Any]:
        """Some rows, (B, D)."""
        if self.file is not None:
            self.file.unchanged()
        return self.array_ND[indices_B]

    def soon(self, indices_B: Indices) -> None:
        """Does nothing: the rows are in memory."""
        del indices_B


@dataclass(frozen=True, eq=False)
class Stored:
    """An array in a file: its rows are contiguous from a given offset."""

    where: str
    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: File
    offset: int

    def rows(self, indices_B: Indices) -> NDArray[Any]:
        """Some rows, (B, D)."""
        width = self._width
        raw = np.empty(len(indices_B) * width, np.uint8)
        if raw.size:
            with self.file.opened() as descriptor:
                filled = 0
                for offset, size in self._spans(indices_B):
                    read_into(descriptor, raw.data[filled : filled + size], offset, self.file.path)
                    filled += size
        return raw.view(self.dtype).reshape(len(indices_B), math.prod(self.shape[1:]))

    def soon(self, indices_B: Indices) -> None:
        """Let the system prefetch rows."""
        self.file.soon(self._spans(indices_B))

    @property
    def _width(self) -> int:
        """The size of a row in bytes."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _spans(self, indices_B: Indices) -> Iterator[tuple[int, int]]:
        """Offset and size of the rows in bytes; contiguous rows are one span."""
        (starts,) = np.nonzero(np.diff(indices_B, prepend=-2) != 1)
        lengths = np.diff(starts, append=len(indices_B))
        for row, length in zip(indices_B[starts].tolist(), lengths.tolist(), strict=True):
            yield self.offset + row * self._width, length * self._width


@dataclass(frozen=True, eq=False)
class Unread:
    """An array of which only the header was read."""

    where: str
    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def rows(self, indices_B: Indices) -> NDArray[Any]:
        """Always raises: to read rows, open the array without naming it in `headers`."""
        raise NotImplementedError(f"{self.where}: {self.key} was opened for its header alone, not for {indices_B}")

    def soon(self, indices_B: Indices) -> None:
        """Does nothing: nothing will be read."""
        del indices_B


def held(where: str, key: str, array: NDArray[Any]) -> Held:
    """An array that the caller has in memory.

    Raises:
        DataError: it does not hold real numbers.
    """
    _numbers(where, key, array.dtype)
    return _held(where, key, array)


def open_npy(paths: Mapping[str, Path], headers: Collection[str] = ()) -> dict[str, Array]:
    """Open the arrays of a shard that consists of .npy files.

    Args:
        paths: of the files, by the array's name.
        headers: the names of arrays of which only the header is read.

    Raises:
        DataError: an array cannot be read.
    """
    arrays: dict[str, Array] = {}
    for key, path in paths.items():
        file = File.at(path)
        with file.opened() as descriptor:
            arrays[key] = _uncompressed(file, descriptor, key, 0, file.signature.size, key in headers)
    return arrays


def open_npz(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...], headers: Collection[str] = ()
) -> dict[str, Array]:
    """Open the arrays of a .npz file.

    Args:
        path: of the file.
        required, optional: the names of the arrays; others are ignored.
        headers: the names of arrays of which only the header is read.

    Raises:
        DataError: the file is no .npz, it lacks an array, or an array cannot be read.
    """
    file = File.at(path)
    with file.opened() as descriptor, os.fdopen(descriptor, "rb", closefd=False) as reading:
        try:
            with zipfile.ZipFile(reading) as archive:
                members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                missing = [key for key in required if key not in members]
                if missing:
                    raise DataError(
                        f"{path}: expected the arrays {' and '.join(required)}, found {_some(list(members))}; "
                        f"save it with np.savez({str(path)!r}, x=features, y=labels)."
                    )
                wanted = [key for key in (*required, *optional) if key in members]
                return {key: _member(file, descriptor, archive, members[key], key, key in headers) for key in wanted}
        except DataError:
            raise
        except _DAMAGED as error:
            raise DataError(f"{path}: no .npz file, or a damaged one: {error}.") from None


def _member(
    file: File, descriptor: int, archive: zipfile.ZipFile, info: zipfile.ZipInfo, key: str, header_alone: bool
) -> Array:
    if info.flag_bits & _ENCRYPTED:
        raise DataError(f"{file.path}: {key} is encrypted; expected a file of np.savez.")
    if info.compress_type == zipfile.ZIP_STORED:
        lengths = bytearray(_LOCAL_HEADER.size)
        read_into(descriptor, memoryview(lengths), info.header_offset, file.path)
        offset = info.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(lengths))
        return _uncompressed(file, descriptor, key, offset, info.file_size, header_alone)
    with archive.open(info) as reading:
        dtype, shape, fortran, header = _header(reading, file.path, key)
        _fits(file.path, key, shape, header + math.prod(shape) * dtype.itemsize, info.file_size)
        if header_alone:
            return Unread(str(file.path), key, dtype, shape)
        raw = bytearray(reading.read())  # to its end, where the zip compares its checksum
    return _in_memory(file, key, np.frombuffer(raw, dtype), shape, fortran)


def _uncompressed(file: File, descriptor: int, key: str, offset: int, size: int, header_alone: bool) -> Array:
    """An uncompressed array: its offset in the file, and its size including the header, in bytes."""
    start = io.BytesIO(os.pread(descriptor, min(size, _HEADER_AT_MOST), offset))
    dtype, shape, fortran, header = _header(start, file.path, key)
    size_in_file = min(size, file.signature.size - offset)
    _fits(file.path, key, shape, header + math.prod(shape) * dtype.itemsize, size_in_file)
    if header_alone:
        return Unread(str(file.path), key, dtype, shape)
    stored = Stored(str(file.path), key, dtype, shape, file, offset + header)
    if not fortran:
        return stored
    flat = Stored(str(file.path), key, dtype, (math.prod(shape),), file, offset + header)
    return _in_memory(file, key, flat.rows(np.arange(math.prod(shape))).ravel(), shape, fortran)


def _fits(path: Path, key: str, shape: tuple[int, ...], expected: int, received: int) -> None:
    if expected != received or min(shape, default=0) < 0:
        raise DataError(
            f"{path}: {key} of shape {shape} takes {expected:,} bytes with its header, and has {received:,}: "
            "the file is cut short, or damaged."
        )


def _in_memory(file: File, key: str, raw: NDArray[Any], shape: tuple[int, ...], fortran: bool) -> Held:
    array = np.array(raw.reshape(shape, order="F" if fortran else "C"), order="C", copy=None)
    return _held(str(file.path), key, array, file)


def _held(where: str, key: str, array: NDArray[Any], file: File | None = None) -> Held:
    rows = array.shape[0] if array.ndim else 1
    return Held(where, key, array.reshape(rows, math.prod(array.shape[1:])), array.shape, file)


def _header(reading: IO[bytes], path: Path, key: str) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """The dtype, the shape, whether it is in Fortran order, and the size of the header in bytes."""
    counted = _Counting(reading)
    try:
        version = np.lib.format.read_magic(counted)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(counted)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(counted)
        else:
            raise DataError(f"{path}: {key} is of .npy version {version}, which is for named fields; expected numbers.")
    except DataError:
        raise
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise DataError(f"{path}: {key} is no array of np.save, or a damaged one: {error}.") from None
    _numbers(str(path), key, dtype)
    return dtype, shape, fortran and len(shape) > 1, counted.read_so_far


def _numbers(where: str, key: str, dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise DataError(
            f"{where}: {key} holds Python objects (pickles), which may run any code when loaded, and are never loaded; "
            "expected numbers. Convert it, e.g. with array.astype('float32'), and save it anew."
        )
    if dtype.kind not in "buif":
        raise DataError(f"{where}: {key} is of dtype {dtype}; expected real numbers: bool, integers or floats.")


class _Counting:
    """A file that counts the bytes that were read of it."""

    def __init__(self, reading: IO[bytes]) -> None:
        self._reading = reading
        self.read_so_far = 0

    def read(self, size: int = -1, /) -> bytes:
        got = self._reading.read(size)
        self.read_so_far += len(got)
        return got


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown}, …" if len(names) > 8 else shown or "none"
