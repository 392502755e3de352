"""Every promise of the service's core is a transcript: see the `.txt` files here, and `play.py` for their language.

`pytest tests/scenarios --rewrite-scenarios` writes what happens now into the files.
"""

from pathlib import Path

import pytest

from scenarios.play import play
from scenarios.transcript import parse, render

_FILES = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_scenario(path: Path, pytestconfig: pytest.Config) -> None:
    """What the service says is what the transcript says, word for word."""
    text = path.read_text(encoding="utf-8")
    got = render(play(parse(text)))
    if pytestconfig.getoption("--rewrite-scenarios", default=False):
        path.write_text(got, encoding="utf-8")
    else:
        assert got == text
