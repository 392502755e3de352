"""SIGINT (Ctrl-C), SIGTERM and SIGUSR1 ask a run to end after its step; a second one ends it as it would have at first.

Batch systems announce the end of a job by SIGTERM, or by a signal of the user's choice, which by custom is SIGUSR1.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Takes note of the first signal while its `with` block lasts.

    A signal reaches the ranks at different moments, and an exchange that one of them leaves fails on all others. So it
    only sets a flag, which the ranks compare in the exchange that ends a step.

    Attributes:
        signal: that came; None: none.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        """Whether this process was asked to end."""
        return self.signal is not None

    def _received(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may ask for signals
            for number in _SIGNALS:
                # What is ignored stays so: a shell's background job, a program under nohup.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()
