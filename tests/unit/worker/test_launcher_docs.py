"""The documentation's tables of endings are those that are tested."""

from __future__ import annotations

from pathlib import Path

from support.endings import ENDINGS
from support.over_ssh import ENDINGS as ENDINGS_OVER_SSH
from support.over_ssh import UNREACHED, UNREACHED_CODE
from support.several import ENDINGS as ENDINGS_OF_SEVERAL

_DOCS = Path(__file__).parents[3] / "docs" / "launching.md"
_SEVERAL = _DOCS.with_name("several-hosts.md")


def test_the_table_of_endings_is_the_tested_one() -> None:
    """Every row is a test and every test a row, in any order, with the same exit code."""
    rows = _rows(_DOCS, "## How a job ends")
    documented = sorted((row[1].strip(), int(row[2])) for row in rows)
    assert documented == sorted((ending.row, ending.code) for ending in ENDINGS)


def test_the_table_of_several_hosts_is_the_tested_one() -> None:
    """With the exit codes on both; the last row needs hosts of its own, and is a test of its own."""
    documented = sorted(
        (row[1].strip(), int(row[2]), int(row[3])) for row in _rows(_SEVERAL, "## How a job on several hosts ends")
    )
    tested = [(ending.row, *ending.codes) for ending in ENDINGS_OF_SEVERAL]
    assert documented == sorted([*tested, ("a host is cut off from the network", 137, 137)])


def test_the_table_of_jobs_over_ssh_is_the_tested_one() -> None:
    """With the exit code of the launcher that started them."""
    documented = sorted((row[1].strip(), int(row[2])) for row in _rows(_SEVERAL, "## From one host, over ssh"))
    tested = [(ending.row, ending.code) for ending in ENDINGS_OVER_SSH]
    assert documented == sorted([*tested, *((host.row, UNREACHED_CODE) for host in UNREACHED)])


def _rows(page: Path, heading: str) -> list[list[str]]:
    section = page.read_text(encoding="utf-8").partition(heading)[2].partition("\n## ")[0]
    return [line.replace("\\|", "").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
