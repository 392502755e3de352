"""What tests of the command line share; the fixture `command` is in `tests/unit/worker/conftest.py`."""

from __future__ import annotations

import re
from collections.abc import Callable

Command = Callable[..., tuple[int, str, str]]
"""Runs `bnlayer` with arguments: exit code, stdout, stderr."""

SMALL_RUN = ("--hidden=8", "--epochs=1", "--batch-size=512", "--transport=none")


def squeezed(text: str) -> str:
    """Without a table's lines and paddings."""
    return re.sub(r"[ │┌┐└┘─┬┴]+", " ", text)
