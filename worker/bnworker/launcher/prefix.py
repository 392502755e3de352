"""Lines of a rank's output, each with the rank in front: `[0] epoch 1`.

Laws of this room:
1. Bytes in, bytes out: nothing is decoded, so nothing can fail on what is no UTF-8, and a character that
   arrives in two pieces leaves in one.
2. Only whole lines leave; a line ends with LF, CR LF or CR (a progress bar's redraw). What is left at the end
   leaves with a line feed of its own.
3. Memory is bounded: a line longer than `LIMIT` leaves in pieces, cut between UTF-8 characters.
"""

from __future__ import annotations

import re

LIMIT = 2**16  # as much as a pipe holds: one read never has to be cut

# A CR at the very end waits: a line feed may follow.
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")


class Prefixer:
    """One stream of one rank."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """The lines that a chunk completes, prefixed."""
        seen = max(0, len(self._rest) - 1)
        text = self._rest + chunk
        lines, end = [], 0
        for match in _LINE_END.finditer(text, seen):
            lines.append(self._prefix + text[end : match.end()])
            end = match.end()
        self._rest = text[end:]
        while len(self._rest) > LIMIT:
            cut = _character_boundary(self._rest, LIMIT)
            lines.append(self._prefix + self._rest[:cut] + b"\n")
            self._rest = self._rest[cut:]
        return b"".join(lines)

    def finish(self) -> bytes:
        """The last line, where it lacks its line feed."""
        rest, self._rest = self._rest.removesuffix(b"\r"), b""
        return self._prefix + rest + b"\n" if rest else b""


def _character_boundary(text: bytes, at: int) -> int:
    """The last position up to `at` where no UTF-8 character is cut; `at` itself where there is none."""
    for cut in range(at, at - 4, -1):
        if text[cut] & 0xC0 != 0x80:  # not a continuation byte: a character starts here
            return cut
    return at
