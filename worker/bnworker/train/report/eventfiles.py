"""A run as TensorBoard's event files, through tensorboardX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from bnworker.train.events import Epoch, Event, Resumed
from bnworker.train.report.history import Point

_FLUSH_S = 5  # seconds between flushes: a killed run loses the points of this time


class EventFiles:
    """Writes TensorBoard event files during the run.

    Points and the results of epochs are written with the number of the step. A resumed run purges what the interrupted
    run wrote for steps after the one that it resumes from.

    Args:
        folder: for `tensorboard --logdir`; each run adds a file to it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: SummaryWriter | None = None

    def add(self, event: Event, point: Point | None) -> None:
        """Write an event, and the point that it completed, if any."""
        if isinstance(event, Resumed):
            self._opened = self._open(purge_step=event.steps + 1)
        if point is not None:
            self._add_point(point)
        if isinstance(event, Epoch):
            self._add_epoch(event)

    def close(self) -> None:
        """Flush and close the file."""
        if self._opened is not None:
            self._opened.close()

    def _open(self, purge_step: int | None = None) -> SummaryWriter:
        return SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=_FLUSH_S)

    @property
    def _writer(self) -> SummaryWriter:
        self._opened = self._opened or self._open()
        return self._opened

    def _add_point(self, point: Point) -> None:
        for name, value in (
            ("loss/train", point.loss),
            ("accuracy/train", point.accuracy),
            ("learning_rate", point.learning_rate),
            ("speed/rows_per_second", point.rows_per_second),
            ("speed/share_of_time_in_exchanges", point.waiting_share),
            ("speed/share_of_time_reading_rows", point.reading_share),
        ):
            self._writer.add_scalar(name, value, point.step)

    def _add_epoch(self, epoch: Epoch) -> None:
        for name, value in (
            ("loss/test", epoch.test_loss),
            ("accuracy/test", epoch.test_accuracy),
            ("loss/validation", epoch.validation_loss),
            ("accuracy/validation", epoch.validation_accuracy),
        ):
            if value is not None:
                self._writer.add_scalar(name, value, epoch.steps)
        for rank, seconds in enumerate(epoch.waiting):
            self._writer.add_scalar(f"waiting_seconds/rank_{rank}", seconds, epoch.steps)
        for layer in epoch.layers:
            for name, values_C in (("moving_mean", layer.moving_mean), ("moving_variance", layer.moving_variance)):
                finite = values_C[np.isfinite(values_C)]
                if finite.size:  # tensorboardX refuses an empty histogram
                    self._writer.add_histogram(f"{layer.name}/{name}", finite, epoch.steps)
