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
from numpy.typing import NDArray

from benchmarks.native import function

Array = NDArray[Any]


def forward(x: Array) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """The variants of (read, copy) on a contiguous float32 array."""
    flat, values, y = x.reshape(-1), x.reshape(-1).view(np.int64), np.zeros(x.size, np.float32)
    reads: dict[str, Callable[[], object]] = {
        "bits": _bound("read_bits", values, values.size),
        "streams": _bound("read_bits_streams", values, values.size),  # several places at once, which prefetches better
        "floats": _bound("read_floats", flat, flat.size),
    }
    copies: dict[str, Callable[[], object]] = {
        "memcpy": lambda: np.copyto(y, flat),
        "scaled": _bound("copy_scaled", flat, y, y.size),  # with one multiplication, so that it is no memcpy
    }
    return {f"{r}, {c}": (reads[r], copies[c]) for r in reads for c in copies}


def backward(dy: Array, x: Array) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """The variants of (read two, triad) on contiguous float32 arrays."""
    g, h, dx = dy.reshape(-1), x.reshape(-1), np.zeros(x.size, np.float32)
    g_values, h_values = g.view(np.int64), h.view(np.int64)
    reads: dict[str, Callable[[], object]] = {
        "bits": _bound("read_two_bits", g_values, h_values, g_values.size),
        "floats": _bound("read_two_floats", g, h, g.size),
    }
    triads: dict[str, Callable[[], object]] = {
        "forwards": _bound("triad", g, h, dx, dx.size),
        "from the end": _bound("triad_chunks", g, h, dx, dx.size),  # it starts on what was read last
    }
    return {f"{r}, {t}": (reads[r], triads[t]) for r in reads for t in triads}


def _bound(name: str, *arguments: Array | int) -> Callable[[], object]:
    probe = function(name)
    return lambda: probe(*arguments)
