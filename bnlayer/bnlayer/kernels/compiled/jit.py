"""How the kernels are compiled: once for this machine, then kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from hashlib import blake2b
from importlib.resources import files
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numba.core import event
from numpy.typing import NDArray

_log = logging.getLogger("bnlayer.kernels")

LINE = 64  # bytes of a cache line

F = TypeVar("F", bound=Callable[..., Any])


def _sources() -> bytes:
    """A name of all that machine code is made from."""
    digest = blake2b(digest_size=16)
    package = files("bnlayer")
    within = sorted((package / "kernels" / "compiled").iterdir(), key=lambda source: source.name)
    for source in (package / "precision.py", *within):
        if source.name.endswith(".py") and source.is_file():
            digest.update(blake2b(source.name.encode() + b"\n" + source.read_bytes()).digest())
    return digest.digest()


_SOURCES = _sources()


def kernel(function: F) -> F:
    """Compile a function when it is first called; it lets other threads run meanwhile.

    No fast mathematics: not one rounding may be contracted or reordered. The machine code is cached beside the source,
    or in the user's cache folder; where neither can be written to, each process compiles anew.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # "no locator available": no folder for the cache
        return cast("F", njit(**options)(function))
    # Numba knows machine code by the file that its kernel is in, whatever has changed in those that it inlines from.
    index = getattr(getattr(compiled, "_cache", None), "_cache_file", None)  # there is no public way
    if index is not None:  # with NUMBA_DISABLE_JIT there is none
        index._source_stamp = (index._source_stamp, _SOURCES)  # noqa: SLF001
    return cast("F", compiled)


def inlined(function: F) -> F:
    """A part of kernels: has no machine code of its own."""
    return cast("F", njit(forceinline=True, error_model="numpy")(function))


@inlined
def lines(size: int) -> NDArray[np.int64]:
    """Zeros that begin with a cache line: a vector that lies across two takes twice as long."""
    accumulators = np.zeros(size + LINE // 8, np.int64)
    first = -accumulators.ctypes.data % LINE // 8
    return accumulators[first : first + size]


class _Announcer(event.Listener):
    """Says so when something is compiled: it was not in the cache, and somebody may be waiting for it."""

    def __init__(self) -> None:
        self._announced = False

    def on_start(self, event: Any) -> None:
        """A compilation begins."""
        module = str(getattr(event.data["dispatcher"].py_func, "__module__", ""))
        if not self._announced and module.startswith(__package__ or ""):
            self._announced = True
            _log.warning(
                "compiling the kernels for this machine; it takes some seconds, once "
                "(BNLAYER_KERNELS=reference does without; NUMBA_CACHE_DIR says where the machine code is kept)"
            )

    def on_end(self, event: Any) -> None:
        """It ends."""


event.register("numba:compile", _Announcer())
