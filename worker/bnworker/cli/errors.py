"""What ends a command with one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bnworker.cli.lines import write_line

# A run was stopped by SIGTERM or SIGUSR1, and its checkpoint is complete: the same command with --resume goes on.
# `EX_TEMPFAIL` of sysexits.h, "the user is invited to retry"; no shell, launcher or signal uses it for anything else.
RESUMABLE = 75

# Exit code of a command's own ranks after they printed the reason: a line of `CommandError`, or a traceback.
EXPLAINED = frozenset({1, 2, RESUMABLE})


class CommandError(Exception):
    """The command cannot do what it was asked for.

    Attributes:
        code: what it exits with: 2 where the user can mend it, 1 where it just failed.
    """

    def __init__(self, message: object, code: int = 2) -> None:
        super().__init__(str(message))
        self.code = code


@contextmanager
def explained() -> Iterator[None]:
    """A `CommandError` within becomes a line on stderr, and the exit code."""
    try:
        yield
    except CommandError as error:
        sys.stdout.flush()
        write_line(f"bnlayer: {error}", error=True)
        sys.exit(error.code)
