"""What earlier versions wrote and sent is read, to the bit: `tests/golden/make_state.py` says how it was made."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bnproto.v1 import statistics_pb2 as pb
from bnserver.core.service import Service
from bnserver.store import Store
from golden.make_state import answers_of, events_of, jobs_in, messages

_STATES = sorted(Path(__file__).parents[2].joinpath("golden", "state").iterdir())


def _contents(folder: Path) -> Any:
    return json.loads((folder / "contents.json").read_text(encoding="utf-8"))


def _agrees(got: Any, expected: Any) -> bool:
    """Whether all that was known then is the same now; a field that is new since is not looked at."""
    if isinstance(expected, dict):
        return isinstance(got, dict) and all(name in got and _agrees(got[name], expected[name]) for name in expected)
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(_agrees, got, expected))
    return bool(got == expected)


@pytest.mark.parametrize("folder", _STATES, ids=lambda folder: folder.name)
def test_a_state_directory_of_an_earlier_version_is_read(folder: Path, tmp_path: Path) -> None:
    """Each job, over or in the middle of a run, with every bit of its statistics; and its ranks can go on."""
    shutil.copytree(folder / "jobs", tmp_path, dirs_exist_ok=True)
    expected = _contents(folder)["jobs"]
    assert set(expected) == {"over", "failed", "running"}
    assert _agrees(jobs_in(tmp_path), expected)
    store = Store(tmp_path)
    service = Service(store.load())
    store.close()
    assert service.active == ("running",)
    assert {"LayerSnapshot", "Began", "Completed", "Pushed"} < set(expected["running"]["records"])


@pytest.mark.parametrize("folder", _STATES, ids=lambda folder: folder.name)
def test_messages_of_an_earlier_version_are_read(folder: Path) -> None:
    """What its ranks send, as the service understands it; and what its service answers."""
    contents = _contents(folder)
    requests = list(messages((folder / "requests.bin").read_bytes(), pb.ExchangeRequest))
    answers = list(messages((folder / "answers.bin").read_bytes(), pb.ExchangeResponse))
    assert {event["is"] for event in contents["events"]} == {"Join", "Contribute", "Pull", "Push", "Leave"}
    assert {answer["kind"] for answer in contents["answers"]} == {"joined", "result", "owned"}
    assert _agrees(events_of(requests), contents["events"])
    assert _agrees(answers_of(answers), contents["answers"])
