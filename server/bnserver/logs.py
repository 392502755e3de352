"""The daemon's log: written by a thread of its own.

Whoever started the daemon may not read its stderr. A full pipe blocks the thread that writes to it, together with
every lock that this thread holds. So that thread neither serves ranks nor holds a lock: it writes below Python's
streams, and the process can end while it is stuck.

As text it is for people. As JSON it is an object a line: `time` (UTC), `level`, `logger`, `message`, `exception` where
there is one, and what the call named by `extra=fields(…)`, such as `job` and `reason`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

_STDERR = 2
_FLUSH_S = 1.0  # lines that stderr has not taken by then are dropped

_TEXT = logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s")

_Records = SimpleQueue[logging.LogRecord | None]


class LogError(RuntimeError):
    """The log file cannot be written."""


def fields(**named: object) -> dict[str, object]:
    """The `extra=` of a log call: what a line of JSON says beside the message."""
    return {"fields": named}


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One line, ASCII alone: nothing that a peer said can end it, or reach a terminal as an escape."""
        record_fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info is not None:
            record_fields["exception"] = self.formatException(record.exc_info)
        elif record.exc_text is not None:
            record_fields["exception"] = record.exc_text
        record_fields |= {
            name: value for name, value in getattr(record, "fields", {}).items() if name not in record_fields
        }
        return json.dumps(record_fields, default=str)


class _ToQueue(QueueHandler):
    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Make text of what the record refers to, which may change before it is written."""
        prepared = copy(record)
        prepared.msg, prepared.args = record.getMessage(), None
        if record.exc_info is not None:
            prepared.exc_text, prepared.exc_info = _TEXT.formatException(record.exc_info), None
        return prepared


@contextmanager
def logged(level: str = "info", file: Path | None = None, form: str = "text") -> Iterator[None]:
    """Send log records to stderr, and to a file, for the length of a `with` block.

    Args:
        level: what stderr gets: debug, info, warning or error.
        file: gets the log from info on, whatever stderr gets; None: there is none.
        form: of both: text or json.

    Raises:
        LogError: the file cannot be written.
    """
    formatter = _Json() if form == "json" else _TEXT
    records: _Records = SimpleQueue()
    stderr = _ToQueue(records)
    stderr.setLevel(level.upper())
    handlers: list[logging.Handler] = [stderr]
    if file is not None:
        try:
            handlers.append(logging.FileHandler(file, mode="w", encoding="utf-8"))
        except OSError as error:
            raise LogError(f"Can't write the log to {file}: {error.strerror}. Name another file.") from error
        handlers[-1].setFormatter(formatter)
    logging.basicConfig(level=stderr.level if file is None else min(stderr.level, logging.INFO), handlers=handlers)
    writer = Thread(target=_write, args=(records, formatter), name="bnserver-log", daemon=True)
    writer.start()
    try:
        yield
    finally:
        records.put(None)
        writer.join(_FLUSH_S)


def _write(records: _Records, formatter: logging.Formatter) -> None:
    for record in iter(records.get, None):
        os.write(_STDERR, f"{formatter.format(record)}\n".encode(errors="backslashreplace"))
