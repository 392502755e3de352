"""`bnlayer calibrate`: as the launcher of its ranks, or as one of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bnworker.cli.errors import CommandError
from bnworker.cli.options import address_of_service, given, with_options
from bnworker.cli.ranks import RanksOfOnePass
from bnworker.cli.several import joined, launch, ranks_to_launch


@with_options(RanksOfOnePass)
def calibrate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="Written by `bnlayer train --save`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="What to write; may be the same file.")],
    data: Annotated[
        str | None, typer.Option(help="What to estimate over; what the model was trained on, if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step, of all workers together.")] = 256,
) -> None:
    """Estimate a trained model's moving statistics anew: exactly, over all training rows, in one pass.

    Moving averages lag behind the weights. This puts the mean and variance of everything in their place; what each
    layer is given is pooled exactly, whatever the number of workers:

    `bnlayer train --data digits --workers 2 --save digits.safetensors`

    `bnlayer calibrate digits.safetensors calibrated.safetensors --workers 2`

    Exit code 2: the file is no checkpoint, or does not fit the data; 1: it failed, or OUT cannot be written.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"
    if out.suffix != ".safetensors":
        raise CommandError(f"calibrate: {out}: expected a name that ends in .safetensors.")
    ranks = given(context, RanksOfOnePass)
    ranks = replace(ranks, address=address_of_service(context, ranks.address, ranks.transport))
    many = ranks_to_launch("calibrate", ranks)
    if many:
        arguments = [str(checkpoint), str(out), f"--batch-size={batch_size}"]
        arguments += [f"--data={data}"] if data is not None else []
        raise typer.Exit(launch("calibrate", checkpoint, arguments, many, ranks))
    _run(checkpoint, out, data, batch_size)


def _run(path: Path, out: Path, data: str | None, batch_size: int) -> None:
    """One rank: all read, the first shows and writes."""
    from bnlayer import CollectiveError
    from bnworker.cli.display import show_calibration
    from bnworker.train.calibration import Calibrated, settings_of
    from bnworker.train.calibration import calibrate as calibrated
    from bnworker.train.checkpoint import CheckpointError, encode, read_by_first
    from bnworker.train.data import DataError, load
    from bnworker.train.files import write_atomically

    world = joined("calibrate")
    first = world.rank == 0
    problem: Exception | None = None
    result: Calibrated | None = None
    with world:
        try:
            start = read_by_first(world, path)
            if start is None:
                raise CheckpointError(f"{path}: there is no such file.")
            settings = settings_of(start)
            loaded = load(
                data or start.data.name,
                settings.dtype,
                world=world,
                validation_split=settings.validation_split,
                labels=start.data.labels,
            )
            result = calibrated(start, loaded, world, batch_size)
        except (CheckpointError, DataError, ValueError) as error:
            problem = error  # the same on every rank: no notification is needed
        except CollectiveError as error:
            raise CommandError(f"calibrate: rank {world.rank}: {type(error).__name__}: {error}", 1) from None
    if problem is not None:
        if first:
            raise CommandError(f"calibrate: {problem}")
        raise typer.Exit(2)
    if first and result is not None:
        try:
            write_atomically(out, encode(result.checkpoint))
        except OSError as error:
            raise CommandError(f"calibrate: {out}: {error.strerror or error}.", 1) from None
        show_calibration(result, out)
