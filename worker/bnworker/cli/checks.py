"""What `bnlayer train` makes sure of before it starts anything."""

from __future__ import annotations

import os
from pathlib import Path

from bnproto.credentials import refusal
from bnworker.cli.errors import CommandError
from bnworker.cli.files import Files
from bnworker.train import data, report, weight_files
from bnworker.train.checkpoint import Checkpoint, CheckpointError, labels_of, read
from bnworker.train.files import prepare
from bnworker.train.settings import Settings
from bnworker.train.weight_files import WeightFileError


def refuse_what_cannot_work(
    name: str, settings: Settings, files: Files, *, replicas: int, launching: bool
) -> Checkpoint | None:
    """Make sure of all that can be known by now.

    Args:
        name: of the data.
        settings: of the run.
        files: that it writes.
        replicas: how many models train side by side.
        launching: whether this process is about to start ranks. Then it looks through the data itself, features
            aside: what is wrong with them is said once, before anything was started.

    Returns:
        The checkpoint that the run goes on from; None: there is none, or none is asked for.

    Raises:
        CommandError: something cannot work; the text says what, and what to do.
    """
    unavailable = refusal(os.environ)
    if unavailable is not None:
        raise CommandError(f"train: {unavailable}")
    _refuse_options_without_meaning(files, replicas)
    try:
        data.check(name)
        for path in filter(None, (files.summary, files.save)):
            prepare(path)
        report.check(files.report, files.tensorboard)
        start = read(files.save) if files.resume and files.save is not None else None
        if start is not None:
            start.refuse_other_settings(settings)
        if start is None and settings.init_from is not None:
            weight_files.read(Path(settings.init_from))
        if launching:
            _examine(name, settings, start)
    except (data.DataError, CheckpointError, WeightFileError, report.MissingExtraError, OSError) as error:
        raise CommandError(f"train: {error}") from None
    return start


def _examine(name: str, settings: Settings, start: Checkpoint | None) -> None:
    """Look through the data, as the ranks will."""
    settings = settings.completed(None if start is None else start.settings)
    labels, split = labels_of(settings, start), settings.validation_split
    rows = data.examine(name, validation_split=split, labels=labels)
    if rows is None and settings.last_batch == "drop":
        rows = data.load(name, settings.dtype, validation_split=split, labels=labels).rows
    if rows is not None:
        data.EpochSteps(rows, settings.batch_size, settings.last_batch or "spread")  # raises where no step is left


def _refuse_options_without_meaning(files: Files, replicas: int) -> None:
    for given, name in ((files.save_every is not None, "--save-every"), (files.resume, "--resume")):
        if given and files.save is None:
            raise CommandError(f"train: {name} needs --save FILE.safetensors, the file that it is about.")
    if files.resume and replicas > 1:
        raise CommandError(
            f"train: --resume: the {replicas} replicas of --transport none are models of their own, and --save keeps "
            "the first one's alone. Leave out --resume, or use --transport service or mpi."
        )
