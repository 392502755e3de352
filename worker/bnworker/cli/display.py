"""What a training run shows: a progress bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bnworker.cli.console import console
from bnworker.train.calibration import Calibrated
from bnworker.train.data import are_numbers, spelled
from bnworker.train.events import Epoch, Event, Resumed, Step
from bnworker.train.loop import Outcome

# Weight of the newest step in the loss, accuracy and speed that the bar shows: a single step's jump about.
_NEWEST = 0.1
_SHOWN_CLASSES = 30
_ROWS_OF = {"test": "test rows", "validation": "validation rows", "train": "training rows", "all": "all rows"}
# Columns of a terminal from which on everything fits.
_WIDE = 100


class Display:
    """Shows a run while it goes on.

    Args:
        steps, epochs: how many there will be, unless the run stops early.
        plain: lines even if the output looks like a terminal: Open MPI gives its ranks one, wherever its own
            output goes.
    """

    def __init__(self, steps: int, epochs: int, *, plain: bool) -> None:
        self._epochs = epochs
        self._console = console(plain=plain)
        self._bar: _Bar | None = None
        if self._console.is_terminal:
            self._bar = _Bar(self._console, steps, epochs)

    def watch(self, event: Event) -> None:
        """Show an event of the run."""
        if isinstance(event, Resumed):
            self._console.print(f"resumed after step {event.steps:,}")
        if self._bar is not None:
            self._bar.watch(event)
        elif isinstance(event, Epoch):
            self._console.print(self._line(event))
            self._console.file.flush()

    def _line(self, epoch: Epoch) -> str:
        speed = epoch.rows / epoch.seconds if epoch.seconds else 0.0
        held_out = "" if epoch.validation_loss is None else f"  validation {epoch.validation_accuracy:.2%}"
        return (
            f"epoch {epoch.number}/{self._epochs}  loss {epoch.loss:.4f}{held_out}  "
            f"accuracy {epoch.test_accuracy:.2%}  {speed:,.0f} rows/s"
        )

    def table(self, outcome: Outcome, summary: Mapping[str, Any]) -> None:
        """Show the result."""
        last, seconds = outcome.epochs[-1], outcome.seconds
        shown = {
            "test accuracy": f"{outcome.test_accuracy:.2%}",
            "test loss": f"{outcome.test_loss:.4f}",
            "validation accuracy": "" if last.validation_accuracy is None else f"{last.validation_accuracy:.2%}",
            "train accuracy": f"{last.accuracy:.2%}",
            "train loss": f"{last.loss:.4f}",
            "labels": "" if are_numbers(outcome.labels) else spelled(outcome.labels),
            "model of epoch": "" if outcome.kept == last.number else f"{outcome.kept}, the best of {last.number}",
            "steps of before": f"{outcome.resumed_steps:,}" if outcome.resumed_steps else "",
            "ranks": f"{summary['world_size']} ({_transport(summary)})",
            "seconds": f"{seconds:.2f}",
            "rows/s": f"{summary['rows_per_second']:,.0f}",
            "exchanges of rank 0": f"{sum(summary['exchanges'].values()):,}",
            "bytes sent by rank 0": f"{summary['bytes_sent']:,}",
            "bytes received by rank 0": f"{summary['bytes_received']:,}",
            "seconds in exchanges": f"{summary['waiting_seconds']:.2f}",
        }
        table = Table(title=f"{summary['data']}: {summary['steps']} steps", title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in shown.items():
            if value:
                table.add_row(name, value)
        self._console.print(table)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.progress.stop()


def show_calibration(result: Calibrated, out: Path) -> None:
    """Show what a calibration changed."""
    table = Table(title=f"statistics of {result.rows:,} rows, in {out}", show_header=True, title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    before, after = result.before, result.after
    table.add_row("test accuracy", f"{before.test_accuracy:.2%}", f"{after.test_accuracy:.2%}")
    table.add_row("test loss", f"{before.test_loss:.4f}", f"{after.test_loss:.4f}")
    console().print(table)


def show_evaluation(evaluation: Mapping[str, Any]) -> None:
    """Show how a model does; class by class where there are few classes.

    Args:
        evaluation: what `bnlayer evaluate --json` prints.
    """
    out = console()
    rows = _ROWS_OF[evaluation["split"]]
    title = f"{evaluation['checkpoint']}, step {evaluation['steps']:,}: {evaluation['data']}, {rows}"
    out.print(Text(title), soft_wrap=True)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    loss = evaluation["loss"]
    for name, value in (
        ("rows", f"{evaluation['rows']:,}"),
        ("accuracy", f"{evaluation['accuracy']:.2%}"),
        ("loss", "not finite" if loss is None else f"{loss:.4f}"),
    ):
        table.add_row(name, value)
    out.print(table)
    if len(evaluation["classes"]) > _SHOWN_CLASSES:
        return
    classes = Table(title="class by class", title_justify="left")
    for heading in ("label", "rows", "recall", "precision", "most often taken for"):
        classes.add_column(heading, justify="right")
    labels = [entry["label"] for entry in evaluation["classes"]]
    for number, (entry, taken) in enumerate(zip(evaluation["classes"], evaluation["confusion"], strict=True)):
        others = [0 if other == number else count for other, count in enumerate(taken)]
        most = max(others)
        mistaken = f"{labels[others.index(most)]} ({most:,})" if most else ""
        classes.add_row(
            str(entry["label"]), f"{entry['rows']:,}", _share(entry["recall"]), _share(entry["precision"]), mistaken
        )
    out.print(classes)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


class _Bar:
    """One line that is drawn anew: where the run is, how well it does, and how long it will still take."""

    def __init__(self, console: Console, steps: int, epochs: int) -> None:
        self._wide = console.width >= _WIDE
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs), markup=False),
            BarColumn(bar_width=None),
            *([MofNCompleteColumn()] if self._wide else []),
            TextColumn("{task.fields[status]}", markup=False),
            _TimeLeft(compact=True, elapsed_when_finished=True),
            console=console,
            expand=True,
        )
        self._task = self.progress.add_task("", total=steps, epoch=1, status="")
        self._loss = self._accuracy = self._speed = math.nan
        self._test = ""

    def watch(self, event: Event) -> None:
        """Move on."""
        if isinstance(event, Resumed):
            self.progress.update(self._task, completed=event.steps, epoch=len(event.epochs) + 1)
        elif isinstance(event, Epoch):
            self._test = f" (test {event.test_accuracy:.1%})" if self._wide else ""
            self.progress.update(self._task, status=self._status())
        elif isinstance(event, Step):
            self._loss = _smooth(self._loss, event.loss)
            self._accuracy = _smooth(self._accuracy, event.accuracy)
            self._speed = _smooth(self._speed, event.rows / event.seconds if event.seconds else 0.0)
            self.progress.update(self._task, advance=1, epoch=event.epoch, status=self._status())

    def _status(self) -> str:
        return f"loss {self._loss:.4f}  accuracy {self._accuracy:.1%}{self._test}  {self._speed:,.0f} rows/s"


class _TimeLeft(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        """The time left, and that it is this; at the end the time that it took."""
        text = super().render(task)
        return text if task.finished else text.append(" left")


def _smooth(before: float, new: float) -> float:
    return new if math.isnan(before) else before + _NEWEST * (new - before)


def _transport(summary: Mapping[str, Any]) -> str:
    if summary["replicas"] > 1:
        return f"one of {summary['replicas']} unsynchronized replicas"
    return str(summary["transport"])
