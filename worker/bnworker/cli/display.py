"""What a training run shows: a progress bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bnworker.training import Epoch, Outcome, Step


class Display:
    """Shows a run while it goes on.

    Args:
        steps, epochs: how many there will be.
        shown: False on all ranks but one: nothing is shown.
        plain: lines even if the output looks like a terminal: Open MPI gives its ranks one, wherever its own
            output goes.
    """

    def __init__(self, steps: int, epochs: int, *, shown: bool, plain: bool) -> None:
        self._epochs = epochs
        self._shown = shown
        self._console = Console(file=sys.stdout, highlight=False, force_terminal=False if plain else None)
        self._accuracy = ""
        self._progress: Progress | None = None
        if shown and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}{task.fields[accuracy]}"),
                TextColumn("{task.fields[speed]:,.0f} rows/s"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=steps, epoch=1, loss=0.0, accuracy="", speed=0.0)

    def watch(self, made: Step | Epoch) -> None:
        """Show a step or an epoch."""
        if not self._shown:
            return
        if self._progress is not None:
            self._redraw(self._progress, made)
        elif isinstance(made, Epoch):
            self._console.print(
                f"epoch {made.number}/{self._epochs}  loss {made.loss:.4f}  accuracy {made.test_accuracy:.2%}  "
                f"{_speed(made.rows, made.seconds):,.0f} rows/s"
            )
            self._console.file.flush()

    def _redraw(self, progress: Progress, made: Step | Epoch) -> None:
        if isinstance(made, Epoch):
            self._accuracy = f"  accuracy {made.test_accuracy:.2%}"
            speed = _speed(made.rows, made.seconds)
            progress.update(self._task, accuracy=self._accuracy, speed=speed)
        else:
            progress.update(self._task, advance=1, epoch=made.epoch, loss=made.loss)

    def table(self, outcome: Outcome, summary: Mapping[str, Any]) -> None:
        """Show the result."""
        last = outcome.epochs[-1]
        table = Table(title=f"{summary['data']}: {summary['steps']} steps", title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in (
            ("test accuracy", f"{last.test_accuracy:.2%}"),
            ("train loss", f"{last.loss:.4f}"),
            ("test loss", f"{last.test_loss:.4f}"),
            ("ranks", f"{summary['world_size']} ({_transport(summary)})"),
            ("seconds", f"{outcome.seconds:.2f}"),
            ("rows/s", f"{summary['rows_per_second']:,.0f}"),
            ("exchanges of rank 0", f"{sum(summary['exchanges'].values()):,}"),
            ("bytes sent by rank 0", f"{summary['bytes_sent']:,}"),
            ("bytes received by rank 0", f"{summary['bytes_received']:,}"),
            ("seconds in exchanges", f"{summary['waiting_seconds']:.2f}"),
        ):
            table.add_row(name, value)
        self._console.print(table)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


def _transport(summary: Mapping[str, Any]) -> str:
    if summary["replicas"] > 1:
        return f"one of {summary['replicas']} unsynchronized replicas"
    return str(summary["transport"])


def _speed(rows: int, seconds: float) -> float:
    return rows / seconds if seconds else 0.0
