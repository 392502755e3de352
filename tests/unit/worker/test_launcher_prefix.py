"""Prefixed output: whole lines, whole characters, bounded memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnworker.launcher.prefix import LIMIT, Prefixer


def through(*chunks: bytes) -> bytes:
    """What leaves, when these chunks come."""
    lines = Prefixer("[0] ")
    return b"".join(map(lines.feed, chunks)) + lines.finish()


@pytest.mark.parametrize(
    ("chunks", "left"),
    [
        ([b"a\nb\n"], b"[0] a\n[0] b\n"),
        ([b"a", b"b\n"], b"[0] ab\n"),
        ([b"no end"], b"[0] no end\n"),
        ([b"\n\n"], b"[0] \n[0] \n"),
        ([], b""),
        ([b"\xe2\x82", b"\xac\n"], b"[0] \xe2\x82\xac\n"),  # a euro sign in two writes
        ([b"\xff\xfe\n"], b"[0] \xff\xfe\n"),  # no UTF-8 at all
        ([b"10%\r20%\r\n"], b"[0] 10%\r[0] 20%\r\n"),
        ([b"dos\r", b"\nnext\n"], b"[0] dos\r\n[0] next\n"),
        ([b"bar\r"], b"[0] bar\n"),
    ],
)
def test_lines(chunks: list[bytes], left: bytes) -> None:
    """Every line leaves whole, with the rank in front."""
    assert through(*chunks) == left


def test_a_line_leaves_as_soon_as_it_ends() -> None:
    """A user who watches a run sees each line when it is written."""
    lines = Prefixer("[1] ")
    assert lines.feed(b"a\nb") == b"[1] a\n"
    assert lines.feed(b"c\n") == b"[1] bc\n"


def test_a_long_line_leaves_in_pieces_between_characters() -> None:
    """Memory stays bounded, and no character is cut."""
    text = ("€" * LIMIT).encode()  # three bytes each: the limit falls inside one
    lines = Prefixer("")
    left = b""
    for start in range(0, len(text), 1000):
        left += lines.feed(text[start : start + 1000])
        assert len(lines._rest) <= LIMIT
    pieces = (left + lines.finish()).split(b"\n")
    assert b"".join(pieces) == text
    assert all(piece.decode() for piece in pieces[:-1])


def test_a_long_line_of_no_characters_is_cut_anyway() -> None:
    """Continuation bytes alone have no boundary; the bound holds."""
    assert through(b"\x80" * (LIMIT + 1)) == b"[0] " + b"\x80" * LIMIT + b"\n[0] \x80\n"


@given(st.lists(st.binary(max_size=8)), st.integers(1, 5))
def test_cuts_cannot_be_seen(parts: list[bytes], size: int) -> None:
    """How the bytes were cut into reads makes no difference."""
    text = b"".join(parts)
    assert through(*(text[at : at + size] for at in range(0, len(text), size))) == through(text)


@given(st.text(alphabet="aé€\n"))
def test_nothing_is_lost(text: str) -> None:
    """Without the prefixes, it is the text that came in."""
    lines = Prefixer("")
    got = lines.feed(text.encode()) + lines.finish()
    assert got.decode().removesuffix("\n") == text.removesuffix("\n")
