"""The events of a run so far, averaged over groups of steps so that a run of any length fits.

point = the mean over `stride` steps, weighted by their rows        stride = ⌈steps / 1000⌉
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bnworker.train.events import Epoch, Event, LayerStatistics, Resumed, Step

_POINTS = 1000  # about the width of a figure in pixels, and the number of points that TensorBoard shows


@dataclass(frozen=True, slots=True)
class Point:
    """The average of some consecutive steps.

    Attributes:
        step: the number of the last of them, from 1.
        loss, accuracy: mean over their rows, in training mode.
        learning_rate: of the last of them.
        rows_per_second: of all ranks.
        waiting_share, reading_share: of this rank's time, spent inside exchanges and reading rows; from 0 to 1.
    """

    step: int
    loss: float
    accuracy: float
    learning_rate: float
    rows_per_second: float
    waiting_share: float
    reading_share: float


class History:
    """The history of one run.

    Args:
        steps: the number of steps of the run, at most.
        steps_per_epoch: the number of steps of a complete epoch.

    Attributes:
        points: averages over `stride` steps.
        epochs: including those before the run was resumed, which have neither times nor layers.
        resumed: steps made before the run was resumed; None: it was not resumed.
    """

    def __init__(self, steps: int, steps_per_epoch: int) -> None:
        self.points: list[Point] = []
        self.epochs: list[Epoch] = []
        self.resumed: int | None = None
        self._stride = max(1, math.ceil(steps / _POINTS))
        self._steps_per_epoch = steps_per_epoch
        self._gathered: list[Step] = []
        self._seconds = self._reading = 0.0

    def add(self, event: Event) -> Point | None:
        """Add an event; returns the point that it completes, if any."""
        if isinstance(event, Resumed):
            self.resumed = event.steps
            self.epochs = list(event.epochs)
        elif isinstance(event, Step):
            self._gathered.append(event)
            if len(self._gathered) == self._stride:
                return self._point()
        elif isinstance(event, Epoch):
            self.epochs.append(event)
            return self._point()  # no point spans two epochs
        return None

    def finish(self) -> None:
        """End the run: the last steps make a point even if they are fewer than `stride`."""
        self._point()

    def _point(self) -> Point | None:
        if not self._gathered:
            return None
        steps, self._gathered = self._gathered, []
        rows, seconds = sum(step.rows for step in steps), math.fsum(step.seconds for step in steps)
        waiting = math.fsum(step.waiting_seconds for step in steps)
        reading = math.fsum(step.reading_seconds for step in steps)
        self._seconds, self._reading = self._seconds + seconds, self._reading + reading
        point = Point(
            step=steps[-1].number,
            loss=math.fsum(step.loss * step.rows for step in steps) / max(1, rows),
            accuracy=math.fsum(step.accuracy * step.rows for step in steps) / max(1, rows),
            learning_rate=steps[-1].learning_rate,
            rows_per_second=rows / seconds if seconds else 0.0,
            waiting_share=waiting / seconds if seconds else 0.0,
            reading_share=reading / seconds if seconds else 0.0,
        )
        self.points.append(point)
        return point

    def position(self, step: int) -> float:
        """A step's position on an axis of epochs: 1.5 is the middle of the second epoch."""
        return step / self._steps_per_epoch

    @property
    def begun(self) -> bool:
        """Whether a step was made."""
        return bool(self.points or self._gathered)

    @property
    def reading_share(self) -> float:
        """The share of this rank's time in steps that was spent on reading rows, from 0 to 1."""
        return self._reading / self._seconds if self._seconds else 0.0

    def layers(self) -> dict[str, list[tuple[int, LayerStatistics]]]:
        """Each layer's statistics after each epoch that has them: name → (steps made, statistics)."""
        statistics: dict[str, list[tuple[int, LayerStatistics]]] = {}
        for epoch in self.epochs:
            for layer in epoch.layers:
                statistics.setdefault(layer.name, []).append((epoch.steps, layer))
        return statistics

    def waiting(self) -> tuple[list[Epoch], NDArray[np.float64]]:
        """The epochs that have every rank's waiting time, and these times in seconds, (epochs, ranks)."""
        timed = [epoch for epoch in self.epochs if epoch.waiting]
        ranks = len(timed[0].waiting) if timed else 0
        return timed, np.array([epoch.waiting for epoch in timed], np.float64).reshape(len(timed), ranks)
