"""SIGINT (Ctrl-C), SIGTERM and SIGUSR1 ask a run to end after its step.

Batch systems announce the end of a job by SIGTERM, or by a signal of the user's choice, which by custom is SIGUSR1.
They may send one after the other, and then SIGKILL, so a second SIGTERM must not keep the checkpoint from being
written. A person who presses Ctrl-C twice means it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

_BATCH_SYSTEMS = (signal.SIGTERM, signal.SIGUSR1)
_SIGNALS = (signal.SIGINT, *_BATCH_SYSTEMS)


class WaitInterrupted(BaseException):
    """A signal came while this process waited for the other ranks; no `Exception`, as KeyboardInterrupt is none."""


class Interruption:
    """Takes note of the first signal while its `with` block lasts; then SIGINT does again what it did before.

    A signal reaches the ranks at different moments, and an exchange that one of them leaves fails on all others. So it
    only sets a flag, which the ranks compare in the exchange that ends a step. While they form the next generation of
    an elastic job there is no such exchange, and perhaps never will be: there it ends the wait (`waiting`).

    Attributes:
        signal: that came; None: none.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._waits = False

    def asked(self) -> bool:
        """Whether this process was asked to end."""
        return self.signal is not None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the block lasts a signal ends it, and one that has come already does so at once.

        Raises:
            WaitInterrupted: this process was asked to end.
        """
        self._waits = True
        try:
            if self.asked():
                raise WaitInterrupted
            yield
        finally:
            self._waits = False

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is None:
            self.signal = signal.Signals(number)
            if signal.SIGINT in self._before:
                signal.signal(signal.SIGINT, self._before.pop(signal.SIGINT))
            if self._waits:
                raise WaitInterrupted

    def _restore(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            if signal.getsignal(number) == self._received:  # it may have come to be ignored
                signal.signal(number, before)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may ask for signals
            for number in _SIGNALS:
                # What is ignored stays so: a shell's background job, a program under nohup.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()


def ignore_batch_systems() -> None:
    """Until the process ends: what has been saved is reported by its exit code, which a signal would replace.

    `srun --kill-on-bad-exit` sends SIGTERM to the other ranks as soon as one has ended with such a code.
    """
    if threading.current_thread() is threading.main_thread():
        for number in _BATCH_SYSTEMS:
            signal.signal(number, signal.SIG_IGN)
