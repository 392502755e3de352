"""What is wrong with the data, and how all ranks come to know it.

A rank reads its own shards alone, so a bad row is seen by one rank. Were it to stop by itself, the others would
report a lost rank. So it keeps its problem, and all ranks raise it together: the same line on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray


class DataError(ValueError):
    """The data cannot be had, or are bad; the text names file and row, and what was expected."""


class Ranks(Protocol):
    """What is needed of the ranks that read together; `World` is one."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    def allreduce(self, arrays: Iterable[ArrayLike], op: Literal["sum", "max", "min"] = "sum") -> list[NDArray[Any]]:
        """Reduce arrays element by element over all ranks."""

    def broadcast(self, arrays: Iterable[ArrayLike] | None = None, root: int = 0) -> list[NDArray[Any]]:
        """Give every rank the root's arrays."""


def raise_on_every_rank(world: Ranks | None, problem: DataError | None) -> None:
    """Return if no rank has a problem; a collective operation that every rank calls.

    Args:
        world: the ranks; None: this process alone.
        problem: this rank's, or None.

    Raises:
        DataError: on every rank, that of the first rank that has one.
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
