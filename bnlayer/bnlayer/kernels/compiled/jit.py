"""How the kernels are compiled: once for this machine, then kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numba.core import event
from numpy.typing import NDArray

_log = logging.getLogger("bnlayer.kernels")

LINE = 64  # bytes of a cache line

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile a function when it is first called; it lets other threads run meanwhile.

    No fast mathematics: not one rounding may be contracted or reordered. The machine code is cached beside the source,
    or in the user's cache folder; where neither can be written to, each process compiles anew.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return cast("F", njit(cache=True, **options)(function))
    except RuntimeError:  # "no locator available": no folder for the cache
        return cast("F", njit(**options)(function))


def inlined(function: F) -> F:
    """A part of kernels: has no machine code of its own."""
    return cast("F", njit(forceinline=True, error_model="numpy")(function))


@inlined
def lines(size: int) -> NDArray[np.int64]:
    """Zeros that begin with a cache line: a vector that lies across two takes twice as long."""
    places = np.zeros(size + LINE // 8, np.int64)
    first = -places.ctypes.data % LINE // 8
    return places[first : first + size]


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
