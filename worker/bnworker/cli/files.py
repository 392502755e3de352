"""The files of a run, as options of `bnlayer train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from bnworker.train.declaration import Setting, at_least

_FILES = "Files"


@dataclass(frozen=True, slots=True)
class Files:
    """What the first rank writes.

    Attributes:
        summary: JSON; None: not asked for.
        report, tensorboard: folders for a page and for event files; None: not asked for.
        save: checkpoints; None: not asked for.
        save_every: steps between two of them; None: at the ends of epochs alone.
        resume: whether to go on from `save`, if it is there.
    """

    summary: Annotated[Path | None, Setting("Write the result as JSON.", _FILES, metavar="FILE.json")] = None
    report: Annotated[Path | None, Setting("Write a page and pictures of the run.", _FILES, metavar="DIR")] = None
    tensorboard: Annotated[Path | None, Setting("Write TensorBoard event files.", _FILES, metavar="DIR")] = None
    save: Annotated[
        Path | None,
        Setting("Write a checkpoint after every epoch and at the end.", _FILES, metavar="FILE.safetensors"),
    ] = None
    save_every: Annotated[int | None, Setting("And after so many steps.", _FILES, at_least(1), "STEPS")] = None
    resume: Annotated[bool, Setting("Go on from the file of --save, if it is there.", _FILES)] = False
