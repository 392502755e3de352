"""What the web page's service remembers, and what the page is made of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.state import LayerState
from bnserver import page
from bnserver.core.generation import Phase
from bnserver.core.observation import JobObservation
from bnserver.page import history
from bnserver.page.history import QUANTILES, SAMPLES, History

_STATIC = Path(page.__file__).parent / "static"


def _state(version: int, mean: float = 0.0, channels: int = 3) -> LayerState:
    values = np.arange(channels, dtype=np.float32)
    moving = Moving(values + np.float32(mean), values + np.float32(1))
    return LayerState(moving, Grid.unknown("float32", channels), BackwardGrid.unknown("float32", channels), version)


def _job(name: str = "j", **states: LayerState) -> JobObservation:
    return JobObservation(name, Phase.RUNNING, 1, 2, 0, None, states, {}, (), 0.0, ())


def test_quantiles_over_time_and_the_distribution_now() -> None:
    """A sample where something has changed, and none where nothing has."""
    seen = History()
    first, second = _state(1), _state(2, mean=0.125)
    for now, state in enumerate((first, first, second)):
        seen.add([_job(a=state)], float(now))
    series = seen.series("j", "a")
    assert series is not None
    assert (series["time"], series["versions"], series["version"]) == ([0.0, 2.0], [1, 2], 2)
    assert series["mean"] == [[0.0, 0.125], [0.5, 0.625], [1.0, 1.125], [1.5, 1.625], [2.0, 2.125]]
    assert [column[-1] for column in series["variance"]] == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert len(series["mean"]) == len(QUANTILES)
    distribution = series["mean_distribution"]
    assert sum(distribution["channels"]) == 3
    assert (distribution["from"][0], distribution["to"][-1]) == (0.125, 2.125)
    assert seen.series("j", "b") is seen.series("i", "a") is None
    json.dumps(series, allow_nan=False)


def test_channels_that_are_alike_are_one_bar() -> None:
    """As at the beginning."""
    seen = History()
    seen.add([_job(a=_state(0, channels=1))], 0.0)
    series = seen.series("j", "a")
    assert series is not None
    assert series["mean_distribution"] == {"from": [0.0], "to": [0.0], "channels": [1.0]}


def test_a_drift_is_an_alarm_once() -> None:
    """Then it is a state of the layer, until the statistics stay where they are."""
    seen = History()
    for version in range(40):
        seen.add([_job(a=_state(version), b=_state(version))], float(version))
    assert not seen.alarms
    for version in range(40, 43):
        seen.add([_job(a=_state(version, mean=9.0), b=_state(version))], float(version))
    (alarm,) = seen.alarms
    assert [alarm[name] for name in ("time", "job", "layer", "what", "channels")] == [40.0, "j", "a", "mean", 3]
    drifts = {layer["layer"]: [drift["what"] for drift in layer["drifts"]] for layer in seen.layers("j")}
    assert drifts == {"a": ["mean"], "b": []}


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples, layers, and nothing of a job that is over; those that are kept stay, however many come."""
    monkeypatch.setattr(history, "LAYERS", 3)
    seen = History()
    for version in range(SAMPLES + 5):
        seen.add([_job("first", a=_state(version), b=_state(version))], float(version))
    series = seen.series("first", "a")
    assert series is not None
    assert series["versions"] == list(range(5, SAMPLES + 5))
    seen.add([_job("new", x=_state(1), y=_state(1), z=_state(1)), _job("first", a=_state(9999), b=_state(9999))], 0.0)
    kept = [layer["layer"] for job in ("first", "new") for layer in seen.layers(job)]
    assert kept[:2] == ["a", "b"]
    seen.add([_job("new", x=_state(2), y=_state(2), z=_state(2), w=_state(1))], 1.0)
    assert seen.layers("first") == []
    assert ([layer["layer"] for layer in seen.layers("new")], seen.left_out) == (["x", "y", "z"], 1)


def test_a_layer_of_other_channels_begins_anew() -> None:
    """It was enrolled anew, with another shape."""
    seen = History()
    seen.add([_job(a=_state(1))], 0.0)
    seen.add([_job(a=_state(2, channels=5))], 1.0)
    series = seen.series("j", "a")
    assert series is not None
    assert series["versions"] == [2]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    """Every address is a file beside it; nothing runs or styles from within, which its own policy forbids."""
    text = (_STATIC / "index.html").read_text(encoding="utf-8")
    for name in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert (_STATIC / name).is_file(), name
    assert "<style" not in text
    assert not re.search(r'\son\w+="|style="', text)
    assert re.findall(r"<script[^>]*>([^<]*)</script>", text) == ["", ""]
    script = (_STATIC / "page.js").read_text(encoding="utf-8")
    for file in ("page.js", "page.css", "index.html"):
        assert not re.search(r"https?:|//\w+\.", (_STATIC / file).read_text(encoding="utf-8")), file
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", script)
    used = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert used <= set(re.findall(r'id="([\w-]+)"', text))


def test_what_is_not_ours_has_its_licence() -> None:
    """uPlot's, unchanged."""
    assert "MIT License" in (_STATIC / "uPlot-LICENSE.txt").read_text(encoding="utf-8")
    assert (
        (_STATIC / "uPlot.iife.min.js").read_text(encoding="utf-8").startswith("/*! https://github.com/leeoniya/uPlot")
    )
