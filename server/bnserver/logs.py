"""The daemon's log: written by a thread of its own.

Whoever started the daemon may not read its stderr. A full pipe blocks the thread that writes to it, together with
every lock that this thread holds. So that thread neither serves ranks nor holds a lock: it writes below Python's
streams, and the process can end while it is stuck.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

_STDERR = 2
_FLUSH_S = 1.0  # lines that stderr has not taken by then are dropped

_FORMAT = logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s")

_Records = SimpleQueue[logging.LogRecord | None]


class LogError(RuntimeError):
    """The log file cannot be written."""


@contextmanager
def logged(level: str = "info", file: Path | None = None) -> Iterator[None]:
    """Send log records to stderr, and to a file, for the length of a `with` block.

    Args:
        level: what stderr gets: debug, info, warning or error.
        file: gets the log from info on, whatever stderr gets; None: there is none.

    Raises:
        LogError: the file cannot be written.
    """
    records: _Records = SimpleQueue()
    stderr = QueueHandler(records)
    stderr.setLevel(level.upper())
    stderr.setFormatter(logging.Formatter("%(message)s"))  # the queue's own; the writer adds time and level
    handlers: list[logging.Handler] = [stderr]
    if file is not None:
        try:
            handlers.append(logging.FileHandler(file, mode="w", encoding="utf-8"))
        except OSError as error:
            raise LogError(f"Can't write the log to {file}: {error.strerror}. Name another file.") from error
        handlers[-1].setFormatter(_FORMAT)
    logging.basicConfig(level=stderr.level if file is None else min(stderr.level, logging.INFO), handlers=handlers)
    writer = Thread(target=_write, args=(records,), name="bnserver-log", daemon=True)
    writer.start()
    try:
        yield
    finally:
        records.put(None)
        writer.join(_FLUSH_S)


def _write(records: _Records) -> None:
    for record in iter(records.get, None):
        os.write(_STDERR, f"{_FORMAT.format(record)}\n".encode(errors="backslashreplace"))
