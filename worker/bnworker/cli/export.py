"""`bnlayer export`: the weights of a checkpoint, in the names and shapes of a framework."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bnworker.cli.errors import CommandError


class Names(StrEnum):
    """Whose names and shapes."""

    keras = "keras"
    torch = "torch"
    bnlayer = "bnlayer"


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="Written by `bnlayer train --save`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.npz|OUT.safetensors", help="What to write.")],
    names: Annotated[
        Names,
        typer.Option(
            help="`keras`: dense_1/kernel, bn_1/gamma; `torch`: dense_1.weight, transposed, bn_1.weight; `bnlayer`: "
            "the normalizations alone, with all that they are, for `bnlayer.interchange.load`."
        ),
    ] = Names.keras,
) -> None:
    """Write the weights and moving statistics of a checkpoint, without all that only training needs.

    `bnlayer export digits.safetensors weights.npz`

    `bnlayer export digits.safetensors weights.safetensors --names torch`

    `bnlayer export digits.safetensors layers.safetensors --names bnlayer`

    Of a run with `--early-stop` these are the best epoch's. Exit code 2: the file is no checkpoint, or OUT has another
    ending; 1: OUT cannot be written.
    """
    from bnlayer.interchange import save
    from bnworker.train.checkpoint import CheckpointError, read
    from bnworker.train.data import spelled
    from bnworker.train.export import encoded, layers
    from bnworker.train.files import write_atomically

    if out.suffix not in (".npz", ".safetensors"):
        raise CommandError(f"export: {out}: expected a name that ends in .npz or .safetensors.")
    try:
        restored = read(checkpoint)
    except CheckpointError as error:
        raise CommandError(f"export: {error}") from None
    if restored is None:
        raise CommandError(f"export: {checkpoint}: no such file.")
    try:
        if names is Names.bnlayer:
            save(out, layers(restored))
        else:
            write_atomically(out, encoded(restored, names.value, out.suffix))
    except CheckpointError as error:
        raise CommandError(f"export: {error}") from None
    except OSError as error:
        raise CommandError(f"export: {out}: {error.strerror}", 1) from None
    if restored.data.numbered is not None and names is not Names.bnlayer:
        typer.echo(f"outputs 0 to {restored.data.classes - 1} stand for the labels {spelled(restored.data.labels)}")
