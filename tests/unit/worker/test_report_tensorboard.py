"""TensorBoard's event files, read back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from bnworker.train.events import LayerStatistics, Resumed
from bnworker.train.report.recorder import Recorder
from support.events import STEPS_PER_EPOCH, epoch, run, step


def events(folder: Path) -> Iterator[Any]:
    """The events of the folder's only file: length, checksum, event, checksum; and again."""
    (path,) = folder.iterdir()
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        at += 12 + length + 4


def written(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """tag → (step, value), in order."""
    values_of: dict[str, list[tuple[int, Any]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            values_of.setdefault(value.tag, []).append((event.step, value))
    return values_of


def test_curves(tmp_path: Path) -> None:
    """What a step and an epoch tell, each at the step that it belongs to."""
    recorder = Recorder(None, tmp_path, 2 * STEPS_PER_EPOCH, STEPS_PER_EPOCH)
    for event in run(2):
        recorder.watch(event)
    recorder.finish({})
    scalars = written(tmp_path)
    curves = {tag: [(at, value.simple_value) for at, value in values] for tag, values in scalars.items()}
    assert curves["loss/train"] == [(number, float(number)) for number in range(1, 11)]
    assert curves["loss/test"] == [(5, 2.0), (10, 1.0)]
    assert curves["accuracy/test"] == [(5, 0.25), (10, 0.625)]
    assert curves["learning_rate"][1] == (2, pytest.approx(0.05))
    assert curves["speed/rows_per_second"][0] == (1, pytest.approx(800))
    assert curves["speed/share_of_time_in_exchanges"][0] == (1, pytest.approx(0.4))
    assert curves["speed/share_of_time_reading_rows"][0] == (1, pytest.approx(0.1))
    assert curves["waiting_seconds/rank_1"] == [(5, pytest.approx(0.02)), (10, pytest.approx(0.02))]
    assert "loss/validation" not in curves


def test_histograms_of_the_moving_statistics(tmp_path: Path) -> None:
    """Of every layer; a value that is not finite is left out, and a layer of nothing else has none."""
    recorder = Recorder(None, tmp_path, 5, 5)
    broken = LayerStatistics("bn_9", np.array([1.0, np.inf]), np.array([np.nan, np.nan]))
    recorded = epoch(1)
    object.__setattr__(recorded, "layers", (*recorded.layers, broken))
    recorder.watch(recorded)
    recorder.finish({})
    histograms = {tag: values[0][1].histo for tag, values in written(tmp_path).items() if "moving" in tag}
    assert sorted(histograms) == [
        "bn_1/moving_mean", "bn_1/moving_variance", "bn_2/moving_mean", "bn_2/moving_variance", "bn_9/moving_mean",
    ]  # fmt: skip
    assert (histograms["bn_1/moving_mean"].min, histograms["bn_1/moving_mean"].max) == (0.0, 3.0)
    assert histograms["bn_9/moving_mean"].num == 1


def test_a_resumed_run_hides_what_was_lost(tmp_path: Path) -> None:
    """Steps that the interrupted run made after its checkpoint are made again: TensorBoard drops the old ones."""
    recorder = Recorder(None, tmp_path, 10, 5)
    recorder.watch(Resumed(6, (epoch(1),)))
    recorder.watch(step(7))
    recorder.finish({})
    marks = [(event.step, event.session_log.status) for event in events(tmp_path) if event.HasField("session_log")]
    assert marks == [(7, event_pb2.SessionLog.START)]
    assert [at for at, _ in written(tmp_path)["loss/train"]] == [7]
