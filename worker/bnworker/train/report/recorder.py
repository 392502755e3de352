"""Records a run's events, and writes its report."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnworker.train.events import Event
from bnworker.train.files import write_atomically
from bnworker.train.report.history import History

if TYPE_CHECKING:
    from bnworker.train.report.eventfiles import EventFiles


class Recorder:
    """Records one run, on the rank that writes the report.

    Args:
        report: the folder of the page and its pictures; None: not asked for.
        tensorboard: the folder of the event files; None: not asked for.
        steps: the number of steps of the run, at most.
        steps_per_epoch: the number of steps of a complete epoch.

    Raises:
        ImportError: a package that is needed can't be imported.
    """

    def __init__(self, report: Path | None, tensorboard: Path | None, steps: int, steps_per_epoch: int) -> None:
        self._report = report
        self._history = History(steps, steps_per_epoch)
        self._files: EventFiles | None = None
        if report is not None:
            import bnworker.train.report.figures  # noqa: F401 - a broken installation shows before the run, not after it
        if tensorboard is not None:
            from bnworker.train.report.eventfiles import EventFiles

            self._files = EventFiles(tensorboard)

    def watch(self, event: Event) -> None:
        """Record an event."""
        if self._report is None and self._files is None:
            return
        point = self._history.add(event)
        if self._files is not None:
            self._files.add(event, point)

    def finish(self, summary: Mapping[str, Any], failure: str | None = None, *, stopped: bool = False) -> Path | None:
        """Write the report: `index.html`, and a PNG for each of its pictures.

        A run that failed before its first step does not overwrite an earlier run's report.

        Args:
            summary: the contents of `--summary`; of a failed run at least data, world_size and transport.
            failure: the error of a run that did not complete; None: it completed.
            stopped: whether it did not complete because it was asked to stop.

        Returns:
            The page; None: none was written.

        Raises:
            OSError: a file can't be written.
        """
        if self._files is not None:
            self._files.close()
        if self._report is None or (failure is not None and not self._history.begun):
            return None
        from bnworker.train.report.figures import pictures
        from bnworker.train.report.page import page

        self._history.finish()
        drawn = pictures(self._history)
        for picture in drawn:
            write_atomically(self._report / f"{picture.name}.png", picture.png)
        when = datetime.now().astimezone().isoformat(" ", "seconds")
        text = page(self._history, drawn, summary, when=when, failure=failure, stopped=stopped)
        path = self._report / "index.html"
        write_atomically(path, text.encode())
        return path
