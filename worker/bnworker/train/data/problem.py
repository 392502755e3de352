"""Errors in the data, and how all ranks raise the same one.

A rank reads only its own shards, so only one rank sees an invalid row. If it raised at once, the others would report a
lost rank. So it keeps the error until the next collective operation, where all ranks raise it: with the same text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray


class DataError(ValueError):
    """The data can't be read, or is invalid; the text names the file, the row, and what was expected."""


class Ranks(Protocol):
    """What this package needs of a world; `World` implements it."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    def allreduce(self, arrays: Iterable[ArrayLike], op: Literal["sum", "max", "min"] = "sum") -> list[NDArray[Any]]:
        """Reduce arrays element by element over all ranks."""

    def broadcast(self, arrays: Iterable[ArrayLike] | None = None, root: int = 0) -> list[NDArray[Any]]:
        """Send the root's arrays to every rank."""


def raise_on_every_rank(world: Ranks | None, problem: DataError | None) -> None:
    """Return if no rank has a problem; a collective operation that every rank calls.

    Args:
        world: the ranks; None: this process alone.
        problem: this rank's error, or None.

    Raises:
        DataError: on every rank: the error of the lowest rank that has one.
        CollectiveError: another rank is lost, or disagrees.
    """
    if world is None:
        if problem is not None:
            raise problem
        return
    (first,) = world.allreduce([np.array(world.world_size if problem is None else world.rank)], "min")
    if first == world.world_size:
        return
    text = None if problem is None else [np.frombuffer(str(problem).encode(errors="backslashreplace"), np.uint8)]
    (message,) = world.broadcast(text, root=int(first))
    raise DataError(message.tobytes().decode())
