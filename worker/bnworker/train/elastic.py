"""The in-memory checkpoint that the ranks of an elastic run resume from after a loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnworker.train.checkpoint import Checkpoint, decode, encode
from bnworker.world import World

_NAME = "the state of the other ranks"


class Kept:
    """The latest checkpoint of a run: every rank has it after the same step (see `bnworker.elastic`).

    Attributes:
        checkpoint: after the latest step; None: no step was made.
        saves: how many checkpoints were kept so far.
    """

    def __init__(self) -> None:
        self.checkpoint: Checkpoint | None = None
        self.saves = 0

    def keep(self, checkpoint: Checkpoint) -> None:
        """Keep the checkpoint of a step; its arrays are copied, because the run continues to write to them."""
        tensors = {name: tensor.copy() for name, tensor in checkpoint.tensors.items()}
        self.checkpoint = replace(checkpoint, tensors=tensors)
        self.saves += 1

    def packed(self) -> list[NDArray[Any]]:
        """The checkpoint's bytes as one array; no array if no step was made."""
        return [] if self.checkpoint is None else [np.frombuffer(encode(self.checkpoint), np.uint8)]

    def take(self, world: World, saves: int, arrays: list[NDArray[Any]]) -> None:
        """Take over the checkpoint that another rank packed."""
        del world
        self.saves = saves
        self.checkpoint = decode(arrays[0].tobytes(), _NAME) if arrays else None
