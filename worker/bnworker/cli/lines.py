"""Lines of a rank, without the libraries that a command line needs."""

from __future__ import annotations

import sys


def write_line(text: str, *, error: bool = False) -> None:
    """Write a line to stdout or stderr, at once: the process may be about to be ended."""
    output = sys.stderr if error else sys.stdout
    output.write(f"{text}\n")
    output.flush()
