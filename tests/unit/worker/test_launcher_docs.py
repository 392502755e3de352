"""The documentation's table of endings is the one that is tested."""

from __future__ import annotations

from pathlib import Path

from support.endings import ENDINGS

_DOCS = Path(__file__).parents[3] / "docs" / "launching.md"


def test_the_table_of_endings_is_the_tested_one() -> None:
    """Every row is a test and every test a row, in any order, with the same exit code."""
    section = _DOCS.read_text(encoding="utf-8").partition("## How a job ends")[2].partition("\n## ")[0]
    rows = [line.replace("\\|", "").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    documented = sorted((row[1].strip(), int(row[2])) for row in rows)
    assert documented == sorted((ending.row, ending.code) for ending in ENDINGS)
