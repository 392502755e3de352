"""One rank of `bnlayer train`, from joining to the files it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from bnlayer import CollectiveError
from bnworker.cli.display import Display
from bnworker.cli.errors import CommandError
from bnworker.data import DataError, Dataset, load
from bnworker.files import write_atomically
from bnworker.joining import join
from bnworker.summary import saved_file, summary, summary_file
from bnworker.training import DivergedError, Replica, Settings, train
from bnworker.world import World


@dataclass(frozen=True, slots=True)
class Files:
    """What the first rank writes.

    Attributes:
        summary: JSON; None: not asked for.
        saved: safetensors; None: not asked for.
    """

    summary: Path | None
    saved: Path | None


def run(
    data: str,
    settings: Settings,
    *,
    transport: str | None,
    address: str | None,
    job: str | None,
    replica: Replica,
    files: Files,
) -> None:
    """Train as the rank that the environment announces; the first one shows progress and writes the files.

    Raises:
        CommandError: the data cannot be had, joining failed, or a file cannot be written.
        typer.Exit: training failed; it was said why.
    """
    try:
        loaded = load(data, settings.dtype)
    except DataError as error:
        raise CommandError(f"train: {error}") from None
    try:
        world = join(transport=transport, address=address or None, job=job or None)
    except CollectiveError as error:
        raise CommandError(f"train: {type(error).__name__}: {error}", 1) from None
    except (ValueError, ImportError, RuntimeError) as error:
        raise CommandError(f"train: {error}") from None
    with world:
        _train(data, loaded, settings, world, replica, files)


def _train(data: str, loaded: Dataset, settings: Settings, world: World, replica: Replica, files: Files) -> None:
    first = world.rank == 0 and replica.index == 0
    display = Display(settings.total_steps(loaded.rows), settings.epochs, shown=first, plain=world.transport == "mpi")
    try:
        with display:
            outcome = train(settings, loaded, world, replica, display.watch)
    except (CollectiveError, DivergedError) as error:
        # Said here: to leave a broken MPI world may end the process.
        rank = replica.index if replica.count > 1 else world.rank
        typer.echo(f"bnlayer: train: rank {rank}: {type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None
    if not first:
        return
    contents = summary(outcome, world, replica, settings, data)
    display.table(outcome, contents)
    try:
        if files.summary is not None:
            write_atomically(files.summary, summary_file(contents))
        if files.saved is not None:
            write_atomically(files.saved, saved_file(outcome, settings, data))
    except OSError as error:
        raise CommandError(f"train: {error}", 1) from None
