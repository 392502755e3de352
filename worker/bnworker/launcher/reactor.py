"""One thread that waits for everything a launcher waits for: output, ends, signals, an alarm.

Nothing here blocks but the one poll, so a full terminal cannot keep the launcher from ending a job, and a
launcher that starts processes has no threads.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

# What a pipe takes without blocking once it is ready (PIPE_BUF, POSIX).
_AT_ONCE = 4096
# Output waiting for a slow reader; beyond it the ranks wait as well.
_FULL = 2**20
_READ = 2**16  # as much as a pipe holds

_CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Reactor:
    """Calls back when a descriptor is ready or the alarm rings."""

    def __init__(self) -> None:
        self._selector = selectors.PollSelector()
        self._alarm: tuple[float, Callable[[], None]] | None = None

    def watch(self, descriptor: int, ready: Callable[[], None], events: int = selectors.EVENT_READ) -> None:
        """Call `ready` whenever a descriptor is."""
        self._selector.register(descriptor, events, ready)

    def forget(self, descriptor: int) -> None:
        """Don't watch a descriptor any more."""
        with suppress(KeyError):
            self._selector.unregister(descriptor)

    def ring(self, seconds: float | None, ready: Callable[[], None]) -> None:
        """Call `ready` once after so many seconds, in place of any earlier alarm; None: never."""
        self._alarm = None if seconds is None else (time.monotonic() + seconds, ready)

    def pump(self, until: Callable[[], bool], seconds: float | None = None) -> None:
        """Call back until a condition holds, or so many seconds have passed."""
        limit = None if seconds is None else time.monotonic() + seconds
        while not until():
            now = time.monotonic()
            if self._alarm is not None and now >= self._alarm[0]:
                ready, self._alarm = self._alarm[1], None
                ready()
                continue
            if limit is not None and now >= limit:
                return
            due = [at for at in (limit, self._alarm and self._alarm[0]) if at is not None]
            for key, _ in self._selector.select(max(0.0, min(due) - now) if due else None):
                if key.fd in self._selector.get_map():  # an earlier callback may have let go of it
                    key.data()


class Sink:
    """Where output goes: a descriptor of the launcher's own, written to when it can take it."""

    def __init__(self, reactor: Reactor, descriptor: int, broken: Callable[[], None]) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._broken: Callable[[], None] | None = broken
        self._queue = bytearray()
        self._waiting: list[Callable[[], None]] = []

    @property
    def full(self) -> bool:
        """Whether its sources should wait."""
        return len(self._queue) > _FULL

    @property
    def empty(self) -> bool:
        """Whether everything was written."""
        return not self._queue

    def put(self, text: bytes) -> None:
        """Write, soon."""
        if not text or self._broken is None:
            return
        if not self._queue:
            self._reactor.watch(self._descriptor, self._write, selectors.EVENT_WRITE)
        self._queue += text

    def when_not_full(self, ready: Callable[[], None]) -> None:
        """Call `ready` once there is room."""
        self._waiting.append(ready)

    def _write(self) -> None:
        try:
            del self._queue[: os.write(self._descriptor, self._queue[:_AT_ONCE])]
        except BlockingIOError:  # another process made it non-blocking, and filled it first
            return
        except OSError:  # the reader is gone
            self._queue.clear()
            if self._broken is not None:
                self._broken()
            self._broken = None
        if not self._queue:
            self._reactor.forget(self._descriptor)
        if not self.full:
            waiting, self._waiting = self._waiting, []
            for ready in waiting:
                ready()


class Consumer(Protocol):
    """Takes what a process writes."""

    def feed(self, chunk: bytes, /) -> None:
        """Take some bytes."""

    def finish(self) -> None:
        """There are no more."""


class OutputPipe:
    """A pipe with a process's output, on its way to its consumers.

    Args:
        reactor: waits for it.
        descriptor: the end of the pipe that is read; closed here.
        sink: while this one is full, nothing is read.
        consumers: get all of it, one after the other.
    """

    def __init__(self, reactor: Reactor, descriptor: int, sink: Sink, consumers: Sequence[Consumer]) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._sink = sink
        self._consumers = consumers
        self._open = True
        os.set_blocking(descriptor, False)
        reactor.watch(descriptor, self._read)

    def drain(self) -> None:
        """Pass on what has arrived, without waiting for more."""
        with suppress(BlockingIOError):
            while self._open:
                self._take()
        self._close()

    def _read(self) -> None:
        with suppress(BlockingIOError):
            self._take()
        if self._open and self._sink.full:
            self._reactor.forget(self._descriptor)
            self._sink.when_not_full(self._resume)

    def _take(self) -> None:
        chunk = os.read(self._descriptor, _READ)
        if not chunk:
            self._close()
            return
        for consumer in self._consumers:
            consumer.feed(chunk)

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._reactor.forget(self._descriptor)
            os.close(self._descriptor)
            for consumer in self._consumers:
                consumer.finish()

    def _resume(self) -> None:
        if self._open:
            self._reactor.watch(self._descriptor, self._read)


@contextmanager
def signals(reactor: Reactor, received: Callable[[int], None]) -> Iterator[None]:
    """Have the reactor call `received(number)` for the signals that a launcher is sent.

    A SIGHUP that is ignored stays so: `nohup` asked for it.
    """
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def ready() -> None:
        for number in os.read(reading, _READ):
            received(number)

    caught = [n for n in _CAUGHT if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in caught}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    reactor.watch(reading, ready)
    try:
        yield
    finally:
        reactor.forget(reading)
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)
