"""The pictures of a run: they show the run's events, labelled, and are the same each time."""

from __future__ import annotations

import math
import struct
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bnworker.train.events import Event, Resumed
from bnworker.train.report.figures import _layer, _learning, _waiting, pictures
from bnworker.train.report.history import History
from support.events import STEPS_PER_EPOCH, epoch, run, step


def recorded(events: list[Event]) -> History:
    """The history of a run."""
    history = History(len(events), STEPS_PER_EPOCH)
    for event in events:
        history.add(event)
    return history


def test_one_picture_of_each_kind() -> None:
    """Loss and accuracy, each layer, the waiting; each a PNG as wide as a page, with a caption."""
    drawn = pictures(recorded(run(3)))
    assert [picture.name for picture in drawn] == ["learning", "layer_bn_1", "layer_bn_2", "waiting"]
    for picture in drawn:
        assert picture.png.startswith(b"\x89PNG\r\n\x1a\n")
        assert struct.unpack(">II", picture.png[16:24]) == (1296, 460)
        assert picture.caption.endswith(".")
    assert "Layer bn_2, 4 channels" in drawn[2].caption


def test_the_same_run_gives_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, and whatever the reader's own matplotlib is set to."""
    before = [picture.png for picture in pictures(recorded(run(2)))]
    monkeypatch.setitem(mpl.rcParams, "axes.facecolor", "red")
    monkeypatch.setitem(mpl.rcParams, "font.size", 30.0)
    assert [picture.png for picture in pictures(recorded(run(2)))] == before
    assert mpl.rcParams["font.size"] == 30.0


def test_loss_and_accuracy() -> None:
    """Training and test over epochs, and every step; axes with names."""
    figure = Figure()
    _learning(recorded(run(3)), figure)
    loss, accuracy = figure.axes
    lines = {str(line.get_label()): line for line in loss.get_lines()}
    assert list(lines) == ["training, per step", "training", "test"]
    assert np.allclose(np.asarray(lines["test"].get_xydata()), [[1.0, 2.0], [2.0, 1.0], [3.0, 2 / 3]])
    assert np.allclose(np.asarray(lines["training, per step"].get_xdata()), np.arange(1, 16) / STEPS_PER_EPOCH)
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("epoch", "cross-entropy, nats per row")
    assert (accuracy.get_xlabel(), accuracy.get_ylabel()) == ("epoch", "rows classified correctly")
    assert [text.get_text() for text in accuracy.texts] == ["test 75.00%"]
    assert accuracy.get_ylim()[0] == pytest.approx(0.25 - 0.05)


def test_a_layers_bands() -> None:
    """Median, middle half and range over the channels, after each epoch."""
    history, figure = recorded(run(3)), Figure()
    _layer(history, history.layers()["bn_1"], figure)
    mean, variance = figure.axes
    assert (mean.get_title(loc="left") or mean.get_title()) == "bn_1: moving mean"
    assert np.allclose(np.asarray(mean.get_lines()[0].get_xydata()), [[1, 1.5], [2, 3.0], [3, 4.5]])
    assert np.allclose(variance.get_lines()[0].get_ydata(), [2.5, 1.75, 1.5])
    widest, half = (band.get_paths()[0].get_extents() for band in mean.collections)
    assert (widest.y0, widest.y1) == (0.0, 9.0)
    assert (half.y0, half.y1) == (0.75, 6.75)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all channels", "middle half", "median"]


def test_waiting_per_rank() -> None:
    """A bar for each rank: what it waited, and the rest of the same time; beside it the share over epochs."""
    figure = Figure()
    _waiting(recorded(run(2, ranks=3)), figure)
    totals, shares = figure.axes
    widths = [bar.get_width() for bar in totals.patches if isinstance(bar, Rectangle)]
    assert widths == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.06, 0.04])
    assert np.allclose(shares.get_lines()[0].get_ydata(), [0.4, 0.4])
    assert (totals.get_xlabel(), totals.get_ylabel(), shares.get_ylabel()) == (
        "seconds",
        "rank",
        "of the epoch's steps",
    )


@pytest.mark.parametrize(
    ("events", "names"),
    [
        ([], []),
        ([step(1)], ["learning"]),
        (run(1, ranks=1), ["learning", "layer_bn_1", "layer_bn_2"]),
        ([epoch(1, layers=("a/b",), test_loss=math.inf)], ["learning", "layer_a_b", "waiting"]),
        ([Resumed(5, (epoch(1, ranks=0, layers=()),)), step(6), epoch(2, ranks=200)], None),
        (run(60, ranks=40), None),
    ],
    ids=["nothing", "no epoch", "one rank", "an odd name", "resumed, 200 ranks", "60 epochs, 40 ranks"],
)
def test_only_recorded_data_are_drawn(events: list[Event], names: list[str] | None) -> None:
    """Runs at the edge: without a warning, and without a picture of nothing."""
    drawn = [picture.name for picture in pictures(recorded(events))]
    assert drawn == (["learning", "layer_bn_1", "layer_bn_2", "waiting"] if names is None else names)


def test_no_module_is_imported_needlessly() -> None:
    """A run without a report loads neither matplotlib nor tensorboardX; a rank no parser, and nothing to show a run."""
    code = (
        "import sys, bnworker.cli.rank, bnworker.cli.started; "
        "print([n for n in ('matplotlib', 'pydantic', 'rich', 'tensorboardX', 'typer') if n in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert ended.stdout == "[]\n"
