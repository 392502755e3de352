"""`bnlayer evaluate`: how good a checkpoint's model is; as the launcher of its ranks, or as one of them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnworker.cli.errors import CommandError
from bnworker.cli.options import address_of_service, given, with_options
from bnworker.cli.ranks import RanksOfOnePass
from bnworker.cli.several import joined, launch, ranks_to_launch

if TYPE_CHECKING:
    from bnworker.train.checkpoint import Checkpoint
    from bnworker.train.data import Dataset
    from bnworker.train.evaluation import Evaluation
    from bnworker.world import World


class Split(StrEnum):
    """Which rows."""

    test = "test"
    validation = "validation"
    train = "train"
    all = "all"


@with_options(RanksOfOnePass)
def evaluate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="Written by `bnlayer train --save`.")],
    data: Annotated[
        str | None, typer.Option(help="What to judge it by; what it was trained on, if not given.", show_default=False)
    ] = None,
    split: Annotated[
        Split | None,
        typer.Option(
            help="Which rows; if not given, the test rows of what it was trained on, and all rows of other data.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    summary: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the same JSON to a file.", show_default=False)
    ] = None,
) -> None:
    """Judge a trained model: accuracy and loss, over all rows and class by class.

    `bnlayer train --data digits --workers 2 --save digits.safetensors`

    `bnlayer evaluate digits.safetensors`

    On rows that it has never seen, as JSON: `bnlayer evaluate digits.safetensors --data new.npz --json`

    Of a run with `--early-stop` the model is the best epoch's. The rows that were held out are found again: they
    depend on the data alone.

    Exit code 2: the file is no checkpoint, or does not fit the data; 1: it failed, or FILE.json cannot be written.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"
    ranks = given(context, RanksOfOnePass)
    ranks = replace(ranks, address=address_of_service(context, ranks.address, ranks.transport))
    many = ranks_to_launch("evaluate", ranks)
    if summary is not None:
        _prepare(summary)
    if many:
        options = {"data": data, "split": split, "summary": summary}
        arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
        arguments += ["--json"] if as_json else []
        raise typer.Exit(launch("evaluate", checkpoint, [*arguments, "--", str(checkpoint)], many, ranks))
    _run(checkpoint, data, split, summary, as_json=as_json)


def _prepare(path: Path) -> None:
    from bnworker.train.files import prepare

    try:
        prepare(path)
    except OSError as error:
        raise CommandError(f"evaluate: --summary: {error}") from None


def _run(path: Path, data: str | None, split: Split | None, summary: Path | None, *, as_json: bool) -> None:
    """One rank: all read, the first shows and writes."""
    from bnlayer import CollectiveError
    from bnworker.cli.display import show_evaluation
    from bnworker.train.checkpoint import CheckpointError, read_by_first
    from bnworker.train.data import DataError
    from bnworker.train.files import write_atomically

    world = joined("evaluate")
    problem: Exception | None = None
    contents: dict[str, Any] = {}
    with world:
        try:
            start = read_by_first(world, path)
            if start is None:
                raise CheckpointError(f"{path}: there is no such file.")
            contents = _evaluated(world, start, data, split)
        except (CheckpointError, DataError) as error:
            problem = error  # the same on every rank: no notification is needed
        except CollectiveError as error:
            raise CommandError(f"evaluate: rank {world.rank}: {type(error).__name__}: {error}", 1) from None
    if problem is not None and world.rank == 0:
        raise CommandError(f"evaluate: {problem}")
    if problem is not None:
        raise typer.Exit(2)
    if world.rank != 0:
        return
    text = json.dumps(contents, indent=2, allow_nan=False) + "\n"
    if as_json:
        typer.echo(text, nl=False)
    else:
        show_evaluation(contents)
    if summary is not None:
        try:
            write_atomically(summary, text.encode())
        except OSError as error:
            raise CommandError(f"evaluate: --summary {summary}: {error.strerror or error}.", 1) from None


def _evaluated(world: World, start: Checkpoint, name: str | None, split: Split | None) -> dict[str, Any]:
    """What is printed and written.

    Raises:
        CheckpointError: the checkpoint does not fit the data.
        DataError: on every rank: the data is bad, or has no such rows.
        CollectiveError: another rank is lost, or disagrees.
    """
    from bnworker.train.calibration import settings_of
    from bnworker.train.checkpoint import CheckpointError
    from bnworker.train.data import load
    from bnworker.train.evaluation import evaluate_splits
    from bnworker.train.model import perceptron

    settings = settings_of(start)
    data = load(
        name or start.data.name,
        settings.dtype,
        world=world,
        validation_split=settings.validation_split,
        labels=start.data.labels,
        training=False,
    )
    if data.features != start.data.features:
        raise CheckpointError(
            f"{start.name} takes {start.data.features} features, those of {start.data.name}; {data.name} has "
            f"{data.features}."
        )
    model = perceptron(settings, data.features, data.classes)
    start.refuse_other_tensors(model.tensors(0))
    model.load(start.best_weights())
    if split is None:
        split = Split.test if data.fingerprint == start.data.fingerprint else Split.all
    names = ("train", "validation", "test") if split is Split.all else (split.value,)
    return _contents(evaluate_splits(model, data, world, names), world, start, data, split)


def _contents(evaluation: Evaluation, world: World, start: Checkpoint, data: Dataset, split: Split) -> dict[str, Any]:
    import math

    def share(part: int, of: int) -> float | None:
        return part / of if of else None

    counts = zip(
        data.labels,
        evaluation.rows_K.tolist(),
        evaluation.predicted_K.tolist(),
        evaluation.correct_K.tolist(),
        strict=True,
    )
    return {
        "checkpoint": start.name,
        "steps": start.progress.steps,
        "data": data.name,
        "split": split.value,
        "rows": evaluation.rows,
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss if math.isfinite(evaluation.loss) else None,
        "classes": [
            {"label": label, "rows": rows, "recall": share(correct, rows), "precision": share(correct, predicted)}
            for label, rows, predicted, correct in counts
        ],
        "confusion": None if evaluation.confusion_KK is None else evaluation.confusion_KK.tolist(),
        "world_size": world.world_size,
        "transport": world.transport,
    }
