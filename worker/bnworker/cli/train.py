"""`bnlayer train`: the main job, as the launcher of its ranks or as one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnworker.cli import configuration
from bnworker.cli.errors import EXPLAINED, RESUMABLE, CommandError

if TYPE_CHECKING:
    from bnlayer.environment import Announcement
    from bnworker.train.checkpoint import Checkpoint
    from bnworker.train.settings import Settings

_RANKS, _MODEL, _DESCENT, _FILES = "Ranks", "Model", "Training", "Files"
# From Ctrl-C to SIGKILL: a step is ended, a checkpoint and a report are written; Kubernetes' own patience. A second
# Ctrl-C kills at once.
_STOP_S = 30.0
_OF_THE_LAUNCHER = frozenset({"workers", "transport", "address", "job", "config", "dry_run"})  # not passed on to ranks


class TrainTransport(StrEnum):
    """How the ranks reach each other."""

    service = "service"
    mpi = "mpi"
    none = "none"


class Precision(StrEnum):
    """Of weights and arithmetic."""

    float32 = "float32"
    float64 = "float64"


class LastBatch(StrEnum):
    """What becomes of the rows of an epoch that do not fill a batch."""

    spread = "spread"
    keep = "keep"
    drop = "drop"


class Schedule(StrEnum):
    """How the learning rate goes on after the warm-up."""

    constant = "constant"
    cosine = "cosine"
    step = "step"


def train(
    context: typer.Context,
    data: Annotated[
        str, typer.Option(help="What to train on: `digits`, `mnist5k`, FILE.npz, or a folder of shards.")
    ] = "digits",
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Options from a file: `batch-size = 64`. Those of the command line beat it.",
            is_eager=True,
            callback=configuration.read,
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run/--no-dry-run", help="Show the plan: rows per rank, exchanges, bytes, memory. Start nothing."
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="How many processes; 1 if not given.", show_default=False, rich_help_panel=_RANKS),
    ] = None,
    transport: Annotated[
        TrainTransport | None,
        typer.Option(
            help="`service` (the default), `mpi`, or `none`: unsynchronized replicas, each on its part of the rows.",
            show_default=False,
            rich_help_panel=_RANKS,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            envvar="BNLAYER_ADDRESS",
            help="Of a running service; without it one is started for this run.",
            rich_help_panel=_RANKS,
        ),
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(envvar="BNLAYER_JOB", help="The job's name; fresh if not given.", rich_help_panel=_RANKS),
    ] = None,
    hidden: Annotated[
        str, typer.Option(metavar="N,N,...", help="Outputs of each hidden layer.", rich_help_panel=_MODEL)
    ] = "128,64",
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Begin with the weights of a Keras or torch model, an export or a checkpoint.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many: labels from 0 to one less, whether all occur or not; those that occur if not given.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    dtype: Annotated[
        Precision, typer.Option(help="Of weights and arithmetic.", rich_help_panel=_MODEL)
    ] = Precision.float32,
    bn_momentum: Annotated[
        float, typer.Option(help="Weight of the old moving statistics.", rich_help_panel=_MODEL)
    ] = 0.99,
    epsilon: Annotated[float, typer.Option(help="Added to the variance.", rich_help_panel=_MODEL)] = 1e-3,
    gamma_regularizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="`l1`, `l2`, `l1_l2`; e.g. `l2=1e-4`.", rich_help_panel=_MODEL),
    ] = None,
    beta_regularizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Likewise.", rich_help_panel=_MODEL)
    ] = None,
    gamma_constraint: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="`non_neg`, `max_norm`, `unit_norm`; e.g. `max_norm=2`.", rich_help_panel=_MODEL
        ),
    ] = None,
    beta_constraint: Annotated[
        str | None, typer.Option(metavar="NAME", help="Likewise.", rich_help_panel=_MODEL)
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.", rich_help_panel=_DESCENT)] = 20,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stop after so many steps, if that is sooner.", show_default=False, rich_help_panel=_DESCENT
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows of a step, of all workers together.", rich_help_panel=_DESCENT)
    ] = 64,
    last_batch: Annotated[
        LastBatch | None,
        typer.Option(
            help="Rows that do not fill a batch: `spread` over the steps of the epoch (the default), "
            "`keep` as a smaller last step, or `drop`. A resumed run goes on as it began.",
            show_default=False,
            rich_help_panel=_DESCENT,
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of gradient descent.", rich_help_panel=_DESCENT)] = 0.1,
    schedule: Annotated[
        Schedule,
        typer.Option(help="Of the learning rate; `cosine` falls to 0 over --epochs.", rich_help_panel=_DESCENT),
    ] = Schedule.constant,
    warmup_steps: Annotated[
        int, typer.Option(help="Steps over which the learning rate rises.", rich_help_panel=_DESCENT)
    ] = 0,
    decay: Annotated[float, typer.Option(help="`--schedule step`: the factor.", rich_help_panel=_DESCENT)] = 0.1,
    decay_epochs: Annotated[
        int, typer.Option(help="`--schedule step`: epochs between two decays.", rich_help_panel=_DESCENT)
    ] = 10,
    momentum: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of gradient descent.", rich_help_panel=_DESCENT)
    ] = 0.9,
    weight_decay: Annotated[
        float,
        typer.Option(
            help="Decoupled (no L2 penalty): kernels shrink by this times the learning rate in each step.",
            rich_help_panel=_DESCENT,
        ),
    ] = 0.0,
    validation_split: Annotated[
        float, typer.Option(help="Share of the training rows to validate on instead.", rich_help_panel=_DESCENT)
    ] = 0.0,
    early_stop: Annotated[
        int | None,
        typer.Option(
            metavar="PATIENCE",
            help="End after so many epochs without a lower validation loss; the result is the best epoch's model.",
            rich_help_panel=_DESCENT,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the initial weights and the order of the rows.", rich_help_panel=_DESCENT)
    ] = 0,
    summary: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write the result as JSON.", show_default=False, rich_help_panel=_FILES),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write a page and pictures of the run.", show_default=False, rich_help_panel=_FILES
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write TensorBoard event files.", show_default=False, rich_help_panel=_FILES),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.safetensors",
            help="Write a checkpoint after every epoch and at the end.",
            show_default=False,
            rich_help_panel=_FILES,
        ),
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="And after so many steps.", rich_help_panel=_FILES)
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Go on from the file of --save, if it is there.", rich_help_panel=_FILES
        ),
    ] = False,
) -> None:
    """Train a perceptron with synchronized batch normalization, data-parallel.

    Two workers, through a statistics service that is started for the run:

    `bnlayer train --data digits --workers 2 --summary out/summary.json`

    The same over MPI: `bnlayer train --workers 3 --transport mpi`, or `mpiexec -n 3 bnlayer train`: inside mpiexec,
    torchrun, srun or `bnlayer launch`, the command is one of the ranks and starts none.

    One that can be killed at any moment, and goes on when it is started again:

    `bnlayer train --workers 3 --save out/digits.safetensors --save-every 100 --resume`

    One that begins where a Keras or torch model of this form is, or an export of ours:

    `bnlayer train --data digits --init-from model.keras`

    The rows of a step, the loss and the statistics do not depend on the number of workers: nor does the result, up to
    the rounding of the Dense layers' gradients. `--transport none` shows what is lost without synchronization;
    with one worker it is a plain single process. A resumed run is bit for bit the one that was cut off, if the number
    of workers is the same; with another one, that rounding differs from there on.

    Ctrl-C, SIGTERM or SIGUSR1 ends it after the step under way: a checkpoint and the report are written. The exit code
    is 130 for Ctrl-C, and otherwise 75, if there is a checkpoint: the same command with --resume goes on.

    Exit code 1: training failed. 2: wrong options, data or checkpoint. Otherwise that of the first worker that failed.
    """
    del config
    # Before NumPy is imported. A rank's share of a batch is small: threads for it cost more than they bring, and
    # those of several ranks fight for the cores.
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"
    from bnlayer.environment import variable
    from bnworker.cli.checks import refuse_what_cannot_work
    from bnworker.cli.rank import Files, run
    from bnworker.train.loop import Replica
    from bnworker.train.settings import Settings, SettingsError

    rank = _rank(os.environ, workers)
    files = Files(summary, save, save_every, report, tensorboard, resume=resume)
    try:
        settings = Settings(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            momentum=momentum,
            hidden=_sizes(hidden),
            seed=seed,
            dtype=dtype.value,
            steps=steps,
            schedule=schedule.value,
            warmup_steps=warmup_steps,
            decay=decay,
            decay_epochs=decay_epochs,
            weight_decay=weight_decay,
            gamma_regularizer=gamma_regularizer,
            beta_regularizer=beta_regularizer,
            gamma_constraint=gamma_constraint,
            beta_constraint=beta_constraint,
            bn_momentum=bn_momentum,
            epsilon=epsilon,
            validation_split=validation_split,
            early_stop=early_stop,
            classes=classes,
            last_batch=None if last_batch is None else last_batch.value,
            init_from=None if init_from is None else str(init_from),
        )
    except SettingsError as error:
        raise CommandError(f"train: {error}") from None
    alone = transport is TrainTransport.none or (
        transport is None and variable(os.environ, "BNLAYER_TRANSPORT") == "alone"
    )
    many = rank.world_size if rank is not None else workers or 1
    launching = rank is None and not dry_run and (transport is not TrainTransport.none or many > 1)
    start = refuse_what_cannot_work(data, settings, files, replicas=many if alone else 1, launching=launching)
    if dry_run:
        if rank is None or rank.rank == 0:
            _show(data, settings, many, str(transport or TrainTransport.service), start)
        return
    if launching:
        raise typer.Exit(_launch(context, many, transport or TrainTransport.service, address, job))
    run(
        data,
        settings,
        transport="alone" if alone else transport and transport.value,
        address=address,
        job=job,
        replica=Replica(rank.rank, rank.world_size) if alone and rank is not None else Replica(),
        files=files,
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


def _show(data: str, settings: Settings, workers: int, transport: str, start: Checkpoint | None) -> None:
    from bnworker.cli.forecast import show
    from bnworker.train.checkpoint import labels_of
    from bnworker.train.data import DataError, load
    from bnworker.train.initial import Sizes, fitted
    from bnworker.train.weight_files import WeightFileError, read

    settings = settings.completed(None if start is None else start.settings)
    try:
        loaded = load(
            data,
            settings.dtype,
            validation_split=settings.validation_split,
            labels=labels_of(settings, start),
        )
        if settings.init_from is not None and start is None:
            fitted(read(Path(settings.init_from)), Sizes.of(settings, loaded))
        show(settings, loaded, workers, transport, start)
    except (DataError, WeightFileError) as error:
        raise CommandError(f"train: {error}") from None


def _launch(
    context: typer.Context, workers: int, transport: TrainTransport, address: str | None, job: str | None
) -> int:
    """Run this command again as each of the ranks."""
    from bnworker.launcher import Job, LaunchError, launch

    command = (sys.executable, "-P", "-m", "bnworker.cli", "train", *_arguments(context))
    kind = "alone" if transport is TrainTransport.none else transport.value
    used = address if transport is TrainTransport.service else None
    try:
        return launch(
            Job(
                command,
                workers,
                kind,
                used or None,
                job or None,
                foreground=True,
                program="train",
                stop_s=_STOP_S,
                explained=EXPLAINED,
                resumable=RESUMABLE,
            )
        )
    except LaunchError as error:
        raise CommandError(f"train: {error}", error.code) from None


def _arguments(context: typer.Context) -> list[str]:
    """The options that make a rank of this run: all of them, wherever they were given."""
    arguments = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name not in _OF_THE_LAUNCHER and value is not None and value is not False:
            arguments.append(parameter.opts[0] if value is True else f"{parameter.opts[0]}={value}")
    return arguments


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CommandError(f"train: --hidden: expected positive integers with commas, e.g. 128,64; received {text!r}.")
    return tuple(map(int, parts))
