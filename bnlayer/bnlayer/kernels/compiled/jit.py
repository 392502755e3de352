"""How the kernels are compiled: once for this machine, then kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Timer
from typing import Any, TypeVar, cast

from numba import njit
from numba.core import event

_SLOW_S = 1.0  # a compilation that takes longer is announced: somebody may be waiting for it

_log = logging.getLogger("bnlayer.kernels")

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


class _Announcer(event.Listener):
    """Says so when a compilation takes long."""

    def __init__(self) -> None:
        self._timer: Timer | None = None
        self._announced = False

    def on_start(self, event: Any) -> None:
        """A compilation begins; those of parts begin within it."""
        module = str(getattr(event.data["dispatcher"].py_func, "__module__", ""))
        if self._timer is None and not self._announced and module.startswith(__package__ or ""):
            self._timer = Timer(_SLOW_S, self._announce)
            self._timer.daemon = True
            self._timer.start()

    def on_end(self, event: Any) -> None:
        """It ends."""
        del event
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _announce(self) -> None:
        self._announced = True
        _log.warning(
            "compiling the kernels for this machine; it takes some seconds, once "
            "(BNLAYER_KERNELS=reference does without; NUMBA_CACHE_DIR says where the machine code is kept)"
        )


event.register("numba:compile", _Announcer())
