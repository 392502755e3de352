"""The table of what works where: its judgement of a cell, and the committed page beside the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import what_works, what_works_picture
from benchmarks.what_works_cases import CASES, Array, of_one_process

_ROOT = Path(__file__).parents[2]
_NUMPY = next(row for row in what_works.ROWS if row.key == "numpy")


def _ranks(name: str, seen: dict[str, Array]) -> list[Any]:
    first = CASES[name].sizes[0]
    parts = [slice(first), slice(first, None)]
    return [{key: value if key[0] == "m" else value[part] for key, value in seen.items()} for part in parts]


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_of_a_cell_follows_from_its_results(name: str) -> None:
    """The bits of one process; the formula within 1e-5; anything else is wrong, and an error is what it says."""
    case, seen = CASES[name], of_one_process(CASES[name], unbiased=False)
    assert what_works._verdict(_NUMPY, case, _ranks(name, seen))["verdict"] == "exact"
    near = {key: value * np.float32(1 + 2e-6) for key, value in seen.items()}
    assert what_works._verdict(_NUMPY, case, _ranks(name, near))["verdict"] == "right"
    for key in ("y 2", "dx 0", "moving mean", "moving variance"):
        wrong = what_works._verdict(_NUMPY, case, _ranks(name, {**seen, key: seen[key] + np.float32(1e-3)}))
        assert wrong["verdict"] == "wrong", key
        missing = what_works._verdict(_NUMPY, case, _ranks(name, {**seen, key: seen[key] * np.nan}))
        assert missing["verdict"] == "wrong", key
    one, two = _ranks(name, seen)
    drifted = what_works._verdict(_NUMPY, case, [one, {**two, "moving mean": two["moving mean"] + np.float32(1)}])
    assert drifted["verdict"] == "wrong", "the ranks differ"
    notified = what_works.Failed("RuntimeError: the other rank closed the connection", at=2.0)
    failed = what_works.Failed("ValueError: not on a CPU\nmore", at=1.0)
    assert what_works._verdict(_NUMPY, case, [notified, failed]) == {
        "verdict": "refused",
        "error": "ValueError: not on a CPU",
    }
    ended = what_works.Failed("still waiting after 300 s", hangs=True)
    assert what_works._verdict(_NUMPY, case, [one, ended])["verdict"] == "hangs"


def test_the_page_has_the_measured_table() -> None:
    """And every cell of ours that could be measured has the bits of one process."""
    document = json.loads((_ROOT / what_works.RESULT).read_text(encoding="utf-8"))
    assert [row["key"] for row in document["rows"]] == [row.key for row in what_works.ROWS]
    assert f"\n{what_works_picture.table(document)}\n" in (_ROOT / "docs" / "what-works.md").read_text(encoding="utf-8")
    for row in document["rows"]:
        verdicts = {cell["verdict"] for cell in row["cells"].values()}
        assert not row["ours"] or verdicts <= {"exact", "not measured"}, row["key"]
