"""The log as lines of JSON; how it gets out of the process is tested with the daemon."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bnserver.logs import fields, logged


@contextmanager
def _logged(*arguments: Any) -> Iterator[None]:
    """`logged`, as in a process that is not pytest's; the root logger is as it was afterwards."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    logger.handlers.clear()
    try:
        with logged(*arguments):
            yield
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)


def test_an_object_a_line_whatever_a_peer_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On stderr and in the file; neither line ends nor escapes get out, and a field does not replace the message."""
    log = logging.getLogger("bnserver")
    with _logged("info", tmp_path / "log", "json"):
        log.info("job %r: %s", "j", "line\nend \x1b[31m", extra=fields(job="j\n", rank=3, message="forged"))
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("a fault")
        log.debug("not said")
    for text in (capfd.readouterr().err, (tmp_path / "log").read_text(encoding="utf-8")):
        assert text.isascii()
        assert "\x1b" not in text
        first, second = map(json.loads, text.splitlines())
        assert {name: first[name] for name in ("level", "logger", "message", "job", "rank")} == {
            "level": "info",
            "logger": "bnserver",
            "message": "job 'j': line\nend \x1b[31m",
            "job": "j\n",
            "rank": 3,
        }
        assert first["time"].endswith("+00:00")
        assert (second["level"], second["message"]) == ("error", "a fault")
        assert second["exception"].splitlines()[-1] == "ValueError: why"
        assert set(second) == {"time", "level", "logger", "message", "exception"}


def test_text_is_for_people(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Fields are for machines alone; a traceback is there once."""
    with _logged("info", tmp_path / "log"):
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("bnserver").exception("a fault", extra=fields(job="j"))
    for text in (capfd.readouterr().err, (tmp_path / "log").read_text(encoding="utf-8")):
        assert text.count("Traceback") == text.count("ValueError: why") == 1
        assert " bnserver ERROR a fault\n" in text
