"""`bnlayer train`: the main job, as the launcher of its ranks or as one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnworker.cli.errors import CommandError

if TYPE_CHECKING:
    from bnlayer.environment import Announcement
    from bnworker.training import Settings


class TrainTransport(StrEnum):
    """How the ranks reach each other."""

    service = "service"
    mpi = "mpi"
    none = "none"


class Precision(StrEnum):
    """Of weights and arithmetic."""

    float32 = "float32"
    float64 = "float64"


def train(
    data: Annotated[str, typer.Option(help="What to train on: `digits`.")] = "digits",
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many processes; 1 if not given.", show_default=False)
    ] = None,
    transport: Annotated[
        TrainTransport | None,
        typer.Option(
            help="`service` (the default), `mpi`, or `none`: unsynchronized replicas, each on its part of the rows.",
            show_default=False,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            envvar="BNLAYER_ADDRESS",
            help="Of a running service; without it one is started for this run.",
        ),
    ] = None,
    job: Annotated[str | None, typer.Option(envvar="BNLAYER_JOB", help="The job's name; fresh if not given.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 20,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many steps, if that is sooner.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step, of all workers together.")] = 64,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of gradient descent.")] = 0.1,
    momentum: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of gradient descent.")] = 0.9,
    hidden: Annotated[str, typer.Option(metavar="N,N,...", help="Outputs of each hidden layer.")] = "128,64",
    seed: Annotated[int, typer.Option(min=0, help="Of the initial weights and the order of the rows.")] = 0,
    dtype: Annotated[Precision, typer.Option(help="Of weights and arithmetic.")] = Precision.float32,
    summary: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the result as JSON.", show_default=False)
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="Save weights, layer states and velocities.", show_default=False),
    ] = None,
) -> None:
    """Train a perceptron with synchronized batch normalization, data-parallel.

    Two workers, through a statistics service that is started for the run:

    `bnlayer train --data digits --workers 2 --summary out/summary.json`

    The same over MPI: `bnlayer train --workers 3 --transport mpi`, or `mpiexec -n 3 bnlayer train`: inside mpiexec,
    torchrun, srun or `bnlayer launch`, the command is one of the ranks and starts none.

    The rows of a step, the loss and the statistics do not depend on the number of workers: nor does the result, up to
    the rounding of the Dense layers' gradients. `--transport none` shows what is lost without synchronization;
    with one worker it is a plain single process.

    Exit code 1: training failed. 2: wrong options or data. Otherwise that of the first worker that failed.
    """
    # Before NumPy is imported. A rank's share of a batch is small: threads for it cost more than they bring, and
    # those of several ranks fight for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from bnworker.data import DataError, check
    from bnworker.files import prepare
    from bnworker.training import Replica, Settings

    rank = _rank(os.environ, workers)
    settings = Settings(epochs, batch_size, learning_rate, momentum, _sizes(hidden), seed, dtype.value, steps)
    try:
        check(data)
        for path in filter(None, (summary, save)):
            prepare(path)
    except (DataError, OSError) as error:
        raise CommandError(f"train: {error}") from None
    if rank is None and (transport is not TrainTransport.none or (workers or 1) > 1):
        arguments = _arguments(data, settings, summary, save)
        raise typer.Exit(_launch(workers or 1, transport or TrainTransport.service, address, job, arguments))

    from bnworker.cli.rank import Files, run

    alone = transport is TrainTransport.none or (transport is None and os.environ.get("BNLAYER_TRANSPORT") == "alone")
    run(
        data,
        settings,
        transport="alone" if alone else transport and transport.value,
        address=address,
        job=job,
        replica=Replica(rank.rank, rank.world_size) if alone and rank is not None else Replica(),
        files=Files(summary, save),
    )


def _rank(environ: Mapping[str, str], workers: int | None) -> Announcement | None:
    """Which rank this process is, where a launcher started it as one of several.

    A Slurm step of one task is a shell on a compute node, not a rank.
    """
    from bnlayer.environment import announced

    try:
        found = next(iter(announced(environ)), None)
    except ValueError as error:
        raise CommandError(f"train: {error}") from None
    if found is None or (found.world_size == 1 and found.variable == "SLURM_PROCID"):
        return None
    if workers not in (None, found.world_size):
        raise CommandError(
            f"train: --workers {workers}, but {found.source} started this process as rank {found.rank} of "
            f"{found.world_size}. Leave out --workers here, or start the command without {found.source}."
        )
    return found


def _launch(
    workers: int, transport: TrainTransport, address: str | None, job: str | None, arguments: Sequence[str]
) -> int:
    """Run this command again as each of the ranks."""
    from bnworker.launcher import Job, LaunchError, launch

    command = (sys.executable, "-m", "bnworker.cli", "train", *arguments)
    kind = "alone" if transport is TrainTransport.none else transport.value
    used = address if transport is TrainTransport.service else None
    try:
        return launch(Job(command, workers, kind, used or None, job or None, foreground=True))
    except LaunchError as error:
        raise CommandError(f"train: {error}", error.code) from None


def _arguments(data: str, settings: Settings, summary: Path | None, save: Path | None) -> list[str]:
    """The options that make a rank of this run."""
    options: dict[str, object] = {
        "--data": data,
        "--epochs": settings.epochs,
        "--steps": settings.steps,
        "--batch-size": settings.batch_size,
        "--learning-rate": settings.learning_rate,
        "--momentum": settings.momentum,
        "--hidden": ",".join(map(str, settings.hidden)),
        "--seed": settings.seed,
        "--dtype": settings.dtype,
        "--summary": summary,
        "--save": save,
    }
    return [f"{name}={value}" for name, value in options.items() if value is not None]


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CommandError(f"train: --hidden: expected positive integers with commas, e.g. 128,64; received {text!r}.")
    return tuple(map(int, parts))
