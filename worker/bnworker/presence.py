"""A joined world's presence in its process: the current collective, and leaving when the process ends.

Laws:
1. A process has at most one joined world, and it is `bnlayer`'s current collective until it is left.
2. However a process ends, short of a crash, the other ranks are notified: of a normal exit, or of the exception.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar

from bnlayer import collective
from bnlayer.agreement import shown

_REASON_LENGTH = 200  # of a failure's text in other ranks' errors, which must stay readable


class Presence:
    """The hooks that a world installs in its process, and removes again.

    Args:
        world: the world that becomes current.
        depart: leaves it, given the reason; "" for a clean end.
        joined: whether the world was joined, and so becomes current; otherwise it only leaves when the process ends.

    Raises:
        RuntimeError: another world is joined.
    """

    _live: ClassVar[Presence | None] = None

    def __init__(self, world: collective.Collective, depart: Callable[[str], None], *, joined: bool = True) -> None:
        if joined:
            self.refuse_second()
        self.world, self._joined = world, joined
        self._process = os.getpid()
        self._depart = depart
        self._before = collective.install(world) if joined else None
        self._hook_before = sys.excepthook
        # Kept, because each access to a bound method makes a new one, and `end` must compare with this one.
        self._hook = self._on_exception
        sys.excepthook = self._hook
        atexit.register(self._at_exit)
        if joined:
            Presence._live = self

    @classmethod
    def refuse_second(cls) -> None:
        """Raise if the process has a joined world.

        Raises:
            RuntimeError: it has.
        """
        if cls._live is not None and cls._live.is_forked:
            raise RuntimeError(
                f"Process {os.getpid()} was forked from one that has joined, {cls._live.world!r}: a rank is one "
                "process. Start this one with subprocess, or multiprocessing's 'spawn', or before joining."
            )
        if cls._live is not None:
            raise RuntimeError(
                f"This process has joined already: {cls._live.world!r}. Use it, or leave it first (world.leave())."
            )

    @property
    def is_forked(self) -> bool:
        """Whether this process is a child of the one that joined."""
        return os.getpid() != self._process

    def end(self) -> None:
        """Remove all hooks."""
        if self._joined:
            Presence._live = None
            collective.install(self._before)
        atexit.unregister(self._at_exit)
        if sys.excepthook is self._hook:
            sys.excepthook = self._hook_before

    def _at_exit(self) -> None:
        if not self.is_forked:
            self._depart("")

    def _on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print the traceback first: leaving may take a while, and may end the process."""
        self._hook_before(kind, error, trace)
        if not self.is_forked:
            self._depart(failure(error))


def failure(error: BaseException | None) -> str:
    """An exception as text for the other ranks; "" if there is none, or for a successful exit."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return ""
    text = shown(str(error).strip().partition("\n")[0])
    reason = f"failed with {type(error).__name__}" + (f": {text}" if text else "")
    return reason if len(reason) <= _REASON_LENGTH else reason[: _REASON_LENGTH - 1] + "…"
