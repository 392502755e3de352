"""A rank that raises, skips a layer or is killed: the others get a named error within a second, gloo's time-out or not.

The error comes out of the forward pass, or through the autograd engine out of `backward()`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from support.adapters import run

_WITHIN_S = 1.0
_FIRST, _SECOND = (r"layer '" + name + r"' \({}, step 1\)" for name in ("first", "second"))
_ENDINGS = {
    "raises": (
        r"PeerLostError rank 1 \(host .*, pid \d+\) failed with KeyError: 'mine'. .* wait in "
        + _FIRST.format("forward")
    ),
    "skips": (
        "StallError The ranks wait for each other: .*"
        + _SECOND.format("forward")
        + ".*; .*rank 1 .* waits in "
        + _FIRST.format("backward")
    ),
    "skips back": (
        "StallError The ranks wait for each other: .*"
        + _SECOND.format("backward")
        + ".*; .*rank 1 .* waits in "
        + _FIRST.format("backward")
    ),
    "is killed": r"PeerLostError rank 1 \(host .*, pid \d+\) crashed or was killed: its connection broke",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of all jobs."""
    folder = tmp_path_factory.mktemp("endings-")
    ended = run([sys.executable, Path(__file__).with_name("torch_ending_rank.py"), folder, *_ENDINGS])
    assert ended.code == 0, ended.out + ended.err
    return folder


@pytest.mark.parametrize("ending", _ENDINGS)
def test_the_other_ranks_raise_the_same_error(folder: Path, ending: str) -> None:
    """By the same text on each of them."""
    records = [(folder / ending / str(rank)).read_text(encoding="utf-8").split(" ", 1) for rank in range(3)]
    raised = [(float(at), text) for at, text in records if text != "odd"]
    assert len(raised) == (3 if ending.startswith("skips") else 2), records
    texts = {text for _, text in raised}
    assert len(texts) == 1, texts
    assert re.match(_ENDINGS[ending], texts.pop()), raised
    if not ending.startswith("skips"):
        assert max(at for at, _ in raised) - float(records[1][0]) <= _WITHIN_S
