"""The memory's speed on this machine: the least that any kernel must do with the same arrays.

    forward     read(x), then copy(x → y)
    backward    read(dy, x), then triad(dy, x → dx)

One thread, the same footprint, outputs that are allocated already. Each probe is written in more than one way, and
the fastest counts: which one that is depends on the processor and on the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]
_STREAMS = 4  # places that are read at once: a processor prefetches several streams better than one


@njit(cache=True, nogil=True)
def read_bits(values: Array) -> np.int64:
    """Every word once, with an operation that no order slows down."""
    seen = np.int64(0)
    for i in range(values.shape[0]):
        seen ^= values[i]
    return seen


@njit(cache=True, nogil=True)
def read_bits_streams(values: Array) -> np.int64:
    """The same from several places at once."""
    quarter = values.shape[0] // _STREAMS
    a, b = values[:quarter], values[quarter : 2 * quarter]
    c, d = values[2 * quarter : 3 * quarter], values[3 * quarter :]
    seen = np.int64(0)
    for i in range(quarter):
        seen ^= (a[i] ^ b[i]) ^ (c[i] ^ d[i])
    return seen


@njit(cache=True, nogil=True, fastmath=True)
def read_floats(x: Array) -> np.float32:
    """Every float once."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i]
    return total


@njit(cache=True, nogil=True)
def copy_scaled(x: Array, y: Array) -> None:
    """Copy with one multiplication, so that the compiler can't call memcpy."""
    for i in range(x.shape[0]):
        y[i] = x[i] * np.float32(1.5)


@njit(cache=True, nogil=True)
def read_two_bits(a: Array, b: Array) -> np.int64:
    """Every word of two arrays once."""
    seen = np.int64(0)
    for i in range(a.shape[0]):
        seen ^= a[i] + b[i]
    return seen


@njit(cache=True, nogil=True, fastmath=True)
def read_two_floats(a: Array, b: Array) -> np.float32:
    """The dot product."""
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@njit(cache=True, nogil=True)
def triad(a: Array, b: Array, out: Array) -> None:
    """out = a − 1.5·b."""
    for i in range(out.shape[0]):
        out[i] = a[i] - b[i] * np.float32(1.5)


@njit(cache=True, nogil=True)
def triad_chunks(a: Array, b: Array, out: Array) -> None:
    """The same from the end, in chunks: it starts on what was read last."""
    size = 8192
    for k in range((out.shape[0] + size - 1) // size):
        stop = out.shape[0] - k * size
        start = max(stop - size, 0)
        a_part, b_part, part = a[start:stop], b[start:stop], out[start:stop]
        for i in range(part.shape[0]):
            part[i] = a_part[i] - b_part[i] * np.float32(1.5)


def forward(x: Array) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """The variants of (read, copy) on a contiguous float32 array."""
    flat, values, y = x.reshape(-1), x.reshape(-1).view(np.int64), np.zeros(x.size, np.float32)
    reads: dict[str, Callable[[], object]] = {
        "bits": lambda: read_bits(values),
        "streams": lambda: read_bits_streams(values),
        "floats": lambda: read_floats(flat),
    }
    copies: dict[str, Callable[[], object]] = {
        "memcpy": lambda: np.copyto(y, flat),
        "scaled": lambda: copy_scaled(flat, y),
    }
    return {f"{r}, {c}": (reads[r], copies[c]) for r in reads for c in copies}


def backward(dy: Array, x: Array) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """The variants of (read two, triad) on contiguous float32 arrays."""
    g, h, dx = dy.reshape(-1), x.reshape(-1), np.zeros(x.size, np.float32)
    g_values, h_values = g.view(np.int64), h.view(np.int64)
    reads: dict[str, Callable[[], object]] = {
        "bits": lambda: read_two_bits(g_values, h_values),
        "floats": lambda: read_two_floats(g, h),
    }
    triads: dict[str, Callable[[], object]] = {
        "forwards": lambda: triad(g, h, dx),
        "from the end": lambda: triad_chunks(g, h, dx),
    }
    return {f"{r}, {t}": (reads[r], triads[t]) for r in reads for t in triads}
