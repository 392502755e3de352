"""How `--dry-run` shows what a run will do."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from bnworker.cli.console import console
from bnworker.train.checkpoint import Checkpoint
from bnworker.train.data import Dataset, EpochSteps, are_numbers, listed, spelled
from bnworker.train.forecast import Forecast, forecast
from bnworker.train.settings import Settings

_MIB = 2**20
_SHOWN_RANKS = 8


def show(settings: Settings, data: Dataset, workers: int, transport: str, start: Checkpoint | None) -> None:
    """Print the plan of a run."""
    plan = forecast(settings, data, workers)
    table = Table(title=f"{data.name}: nothing was started", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    not_read = [("not read", Text(listed(data.ignored)))] if data.ignored else []
    rows = f"{data.rows:,} to train on, {data.validation_rows:,} to validate, {data.test_rows:,} to test"
    for name, value in (
        ("rows", f"{rows}; {data.features:,} features, {classes(data)}"),
        *not_read,
        ("ranks", f"{workers} ({transport})"),
        ("training rows per rank", _listed(plan.rows_per_rank)),
        ("rows of a step", f"{_sizes(plan.epoch)}; per rank, at most {_listed(plan.step_rows_per_rank)}"),
        ("steps", f"{plan.steps:,}, {plan.steps_per_epoch:,} an epoch"),
        ("goes on from", _beginning(settings, start)),
        ("learning rate", _rates(settings, plan)),
        ("parameters", f"{plan.parameters:,} {settings.dtype}"),
        *(_wire(plan) if transport != "none" else (("exchanges", "none"),)),
        ("memory per rank", f"about {plan.memory_bytes / _MIB:,.0f} MiB, beside data that is held whole"),
    ):
        table.add_row(name, value)
    console().print(table)


def _beginning(settings: Settings, start: Checkpoint | None) -> str:
    if start is not None:
        return f"step {start.progress.steps:,} of {start.name}"
    return "the beginning" + ("" if settings.init_from is None else f", with the weights of {settings.init_from}")


def _wire(plan: Forecast) -> list[tuple[str, str]]:
    return [
        ("exchanges per step", str(len(plan.exchanges))),
        *((f"  {exchange.name}", f"{exchange.bytes:,} bytes") for exchange in plan.exchanges),
        ("bytes a rank sends per step", f"{plan.step_bytes:,}"),
        ("  where grids are looked for", f"{plan.probe_bytes:,} more: in the first step, rarely later"),
        ("  after an epoch", f"{plan.evaluation_bytes:,}"),
        ("  at the start", f"{plan.start_bytes:,}, from rank 0"),
    ]


def classes(data: Dataset) -> str:
    """How many, and their labels where output k does not stand for label k."""
    labels = "" if are_numbers(data.labels) else f" with the labels {spelled(data.labels)}"
    return f"{data.classes:,} classes{labels}"


def _sizes(epoch: EpochSteps) -> str:
    """The rows of an epoch's steps: `62 or 63 (spread)`, `64, the last of an epoch 30 (keep)`."""
    how = f"({epoch.last_batch})"
    if epoch.left_out:
        return f"{epoch.largest:,}; {epoch.left_out:,} rows are left out, other ones in each epoch {how}"
    if epoch.smallest == epoch.largest:
        return f"{epoch.largest:,} {how}"
    if epoch.last_batch == "spread":
        return f"{epoch.smallest:,} or {epoch.largest:,} {how}"
    return f"{epoch.largest:,}, the last of an epoch {epoch.smallest:,} {how}"


def _listed(counts: tuple[int, ...]) -> str:
    if len(counts) <= _SHOWN_RANKS:
        return ", ".join(f"{count:,}" for count in counts)
    return f"{min(counts):,} to {max(counts):,}"


def _rates(settings: Settings, plan: Forecast) -> str:
    first = settings.learning_rate_of(1, plan.steps_per_epoch)
    last = settings.learning_rate_of(plan.steps, plan.steps_per_epoch)
    return f"{settings.schedule}: {first:g} in the first step, {last:g} in the last"
