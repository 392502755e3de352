"""Prefixed output: whole lines, whole characters, bounded memory; time and colour for a terminal."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnworker.launcher.prefix import LIMIT, Prefixer, Style


def prefixer(head: bytes) -> Prefixer:
    """Lines that all have the same head."""
    return Prefixer(lambda: head)


def through(*chunks: bytes) -> bytes:
    """What leaves, when these chunks come."""
    lines = prefixer(b"[0] ")
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
    lines = prefixer(b"[1] ")
    assert lines.feed(b"a\nb") == b"[1] a\n"
    assert lines.feed(b"c\n") == b"[1] bc\n"


@pytest.mark.parametrize("line", ["€" * LIMIT, "a" + "𝄞" * LIMIT], ids=["three bytes", "four bytes"])
def test_a_long_line_leaves_in_pieces_between_characters(line: str) -> None:
    """Memory stays bounded, and no character is cut: the limit falls inside one, at its last byte of four."""
    text = line.encode()
    lines = prefixer(b"")
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
def test_cuts_do_not_change_the_result(parts: list[bytes], size: int) -> None:
    """How the bytes were cut into reads makes no difference."""
    text = b"".join(parts)
    assert through(*(text[at : at + size] for at in range(0, len(text), size))) == through(text)


@given(st.text(alphabet="aé€\n"))
def test_nothing_is_lost(text: str) -> None:
    """Without the prefixes, it is the text that came in."""
    lines = prefixer(b"")
    got = lines.feed(text.encode()) + lines.finish()
    assert got.decode().removesuffix("\n") == text.removesuffix("\n")


# ---- what stands in front ----

NOON = datetime(2024, 2, 29, 12, 0, 3, 45999, tzinfo=UTC)


@pytest.mark.parametrize(
    ("style", "head"),
    [
        (Style(timestamps=False, colour=False), b"[2] "),
        (Style(timestamps=True, colour=False), b"12:00:03.045 [2] "),
        (Style(timestamps=False, colour=True), b"\x1b[33m[2]\x1b[0m "),
        (Style(timestamps=True, colour=True), b"\x1b[33m12:00:03.045 [2]\x1b[0m "),
    ],
)
def test_heads(style: Style, head: bytes) -> None:
    """Milliseconds are cut, not rounded into the next second; the colour ends before the text."""
    assert style.head("[2]", 2, NOON) == head


def test_neighbours_differ_in_colour_and_red_is_left_to_errors() -> None:
    """Eight colours, then again; what is no rank is bold."""
    style = Style(timestamps=False, colour=True)
    heads = [style.head("[r]", rank, NOON) for rank in range(9)]
    assert len(set(heads)) == 8
    assert heads[8] == heads[0]
    assert not any(b"[31m" in head or b"[91m" in head for head in heads)
    assert style.head("[service]", None, NOON) == b"\x1b[1m[service]\x1b[0m "


@pytest.mark.parametrize(
    ("terminal", "asked", "environ", "style"),
    [
        (True, None, {}, Style(timestamps=True, colour=True)),
        (True, False, {}, Style(timestamps=False, colour=True)),
        (True, None, {"NO_COLOR": "1"}, Style(timestamps=True, colour=False)),
        (True, None, {"NO_COLOR": ""}, Style(timestamps=True, colour=True)),
        (True, None, {"TERM": "dumb"}, Style(timestamps=True, colour=False)),
        (False, None, {}, Style(timestamps=False, colour=False)),
        (False, True, {}, Style(timestamps=True, colour=False)),
    ],
)
def test_the_style_of_an_output(terminal: bool, asked: bool | None, environ: dict[str, str], style: Style) -> None:
    """A pipe gets neither time nor colour unless time is asked for; NO_COLOR counts if it is not empty."""
    assert Style.of(terminal=terminal, timestamps=asked, environ=environ) == style


def test_a_line_carries_the_time_of_its_end() -> None:
    """The head is asked for when a line is complete, not when it began."""
    heads = iter([b"1 ", b"2 "])
    lines = Prefixer(lambda: next(heads))
    assert lines.feed(b"a") == b""
    assert lines.feed(b"b\n") == b"1 ab\n"
    assert lines.feed(b"c") == b""
    assert lines.finish() == b"2 c\n"
