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
from queue import SimpleQueue
from threading import Thread

_STDERR = 2
_FLUSH_S = 1.0  # what nobody has read by then is given up

_Records = SimpleQueue[logging.LogRecord | None]


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Send what is logged to stderr, for the length of a `with` block."""
    records: _Records = SimpleQueue()
    logging.basicConfig(level=logging.INFO, handlers=[QueueHandler(records)])
    writer = Thread(target=_write, args=(records,), name="bnserver-log", daemon=True)
    writer.start()
    try:
        yield
    finally:
        records.put(None)
        writer.join(_FLUSH_S)


def _write(records: _Records) -> None:
    formatter = logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s")
    for record in iter(records.get, None):
        os.write(_STDERR, f"{formatter.format(record)}\n".encode(errors="backslashreplace"))
