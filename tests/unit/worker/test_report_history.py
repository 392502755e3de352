"""What a report remembers of a run: everything that a picture shows, and no more than fits."""

from __future__ import annotations

import numpy as np
import pytest

from bnworker.train.events import Event, Resumed, Saved
from bnworker.train.report.history import History, Point
from support.events import STEPS_PER_EPOCH, epoch, run, step


def recorded(events: list[Event], steps: int) -> tuple[History, list[Point]]:
    """A history of a run of so many steps, and the points that it said were complete."""
    history = History(steps, STEPS_PER_EPOCH)
    points = [history.add(event) for event in events]
    return history, [point for point in points if point is not None]


def test_a_short_run_keeps_every_step() -> None:
    """With its loss, speed and share of waiting."""
    history, points = recorded(run(2), 2 * STEPS_PER_EPOCH)
    assert points == history.points
    assert [point.step for point in points] == list(range(1, 11))
    assert points[2].loss == 3.0
    assert points[2].rows_per_second == pytest.approx(800)
    assert points[2].waiting_share == pytest.approx(0.4)
    assert points[2].reading_share == pytest.approx(0.1)
    assert history.reading_share == pytest.approx(0.1)


def test_a_long_run_is_thinned() -> None:
    """Five thousand steps become a thousand points: means over the steps, weighted by their rows."""
    history = History(5000, 5000)
    for number in range(1, 5001):
        history.add(step(number, rows=30 if number == 5 else 10))
    assert len(history.points) == 1000
    assert history.points[0].step == 5
    assert history.points[0].loss == pytest.approx((1 + 2 + 3 + 4 + 3 * 5) / 7)
    assert history.points[0].learning_rate == 0.1 / 5
    assert history.points[-1].step == 5000


def test_no_point_spans_two_epochs() -> None:
    """Three thousand steps are taken three by three; the five of an epoch are three and two."""
    _, points = recorded(run(2), 3000)
    assert [point.step for point in points] == [3, 5, 8, 10]


def test_steps_without_rows() -> None:
    """An unsynchronized replica may have none; nothing is divided by zero."""
    history, _ = recorded([step(1, rows=0)], 1)
    assert (history.points[0].loss, history.points[0].rows_per_second) == (0.0, 0.0)


def test_a_resumed_run_shows_the_epochs_of_before() -> None:
    """Which know their losses, but neither layers nor waiting times."""
    before = tuple(epoch(number, ranks=0, layers=()) for number in (1, 2))
    history, _ = recorded([Resumed(12, before), *(step(number) for number in (13, 14, 15)), epoch(3), Saved(15)], 15)
    assert history.resumed == 12
    assert [one.number for one in history.epochs] == [1, 2, 3]
    assert [steps for steps, _ in history.layers()["bn_1"]] == [15]
    timed, waited = history.waiting()
    assert [one.number for one in timed] == [3]
    assert waited.tolist() == [[0.01, 0.02]]
    assert history.position(12) == 2.4


def test_layers_over_time() -> None:
    """Each layer's statistics after each epoch, in order."""
    history, _ = recorded(run(3), 15)
    layers = history.layers()
    assert list(layers) == ["bn_1", "bn_2"]
    assert [steps for steps, _ in layers["bn_2"]] == [5, 10, 15]
    assert np.array_equal(layers["bn_2"][2][1].moving_mean, [0.0, 3.0, 6.0, 9.0])


def test_an_empty_history() -> None:
    """A run that failed at once has an empty history."""
    history = History(10, 5)
    assert (history.points, history.epochs, history.layers(), history.reading_share) == ([], [], {}, 0.0)
    assert history.waiting()[1].shape == (0, 0)
