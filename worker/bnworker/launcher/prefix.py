"""Lines of a rank's output, each with the rank in front: `[0] epoch 1`.

Laws:
1. Bytes in, bytes out: nothing is decoded, so nothing can fail on what is no UTF-8, and a character that
   arrives in two pieces leaves in one.
2. Only whole lines leave; a line ends with LF, CR LF or CR (a progress bar's redraw). What is left at the end
   leaves with a line feed of its own.
3. Memory is bounded: a line longer than `LIMIT` leaves in pieces, cut between UTF-8 characters.
4. The prefix depends on the reader: time and colour for a person at a terminal, `[0] ` alone for a program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from bnlayer.environment import variable

LIMIT = 2**16  # as much as a pipe holds: one read never has to be cut

# A CR at the very end waits: a line feed may follow.
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")

# SGR codes, legible on dark and on light ground; red is left to errors.
_RANKS = ("36", "32", "33", "35", "34", "96", "92", "95")
_OTHERS = "1"


@dataclass(frozen=True, slots=True)
class Style:
    """The style of a line's prefix.

    Attributes:
        timestamps: the time, local, to the millisecond.
        colour: one for each rank, bold for who is none.
    """

    timestamps: bool
    colour: bool

    @classmethod
    def of(cls, *, terminal: bool, timestamps: bool | None, environ: Mapping[str, str]) -> Style:
        """The style for one output: time and colour on a terminal, neither elsewhere.

        Args:
            terminal: whether the output is one.
            timestamps: what the user asked for; None: nothing.
            environ: NO_COLOR, if not empty, and TERM=dumb turn colour off.
        """
        colour = terminal and variable(environ, "NO_COLOR") is None and variable(environ, "TERM") != "dumb"
        return cls(terminal if timestamps is None else timestamps, colour)

    def head(self, label: str, rank: int | None, now: datetime) -> bytes:
        """The prefix of a line that is complete now; rank None: a line of no rank."""
        time = f"{now:%H:%M:%S}.{now.microsecond // 1000:03d} " if self.timestamps else ""
        if not self.colour:
            return f"{time}{label} ".encode()
        code = _OTHERS if rank is None else _RANKS[rank % len(_RANKS)]
        return f"\x1b[{code}m{time}{label}\x1b[0m ".encode()


class Prefixer:
    """One output of one process.

    Args:
        head: called when a line is complete; returns its prefix.
    """

    def __init__(self, head: Callable[[], bytes]) -> None:
        self._head = head
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """The lines that a chunk completes, prefixed."""
        seen = max(0, len(self._rest) - 1)
        text = self._rest + chunk
        lines, end = [], 0
        for match in _LINE_END.finditer(text, seen):
            lines.append(text[end : match.end()])
            end = match.end()
        self._rest = text[end:]
        while len(self._rest) > LIMIT:
            cut = _character_boundary(self._rest, LIMIT)
            lines.append(self._rest[:cut] + b"\n")
            self._rest = self._rest[cut:]
        if not lines:
            return b""
        head = self._head()
        return b"".join(head + line for line in lines)

    def finish(self) -> bytes:
        """The last line, where it lacks its line feed."""
        rest, self._rest = self._rest.removesuffix(b"\r"), b""
        return self._head() + rest + b"\n" if rest else b""


def _character_boundary(text: bytes, at: int) -> int:
    """The last position up to `at` where no UTF-8 character is cut; `at` itself where there is none."""
    for cut in range(at, at - 4, -1):
        if text[cut] & 0xC0 != 0x80:  # not a continuation byte: a character starts here
            return cut
    return at
