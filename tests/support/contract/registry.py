"""The bodies of the contract, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnworker import World


@dataclass(frozen=True)
class Body:
    """One test body.

    Attributes:
        run: what each rank does.
        sizes: the numbers of ranks it is for.
        transports: those it is for.
    """

    run: Callable[[World], object]
    sizes: tuple[int, ...] = (1, 2, 3)
    transports: tuple[str, ...] = ("alone", "mpi", "service", "torch")

    def runs_in(self, transport: str, world_size: int) -> bool:
        """Whether it is for such a world."""
        return transport in self.transports and world_size in self.sizes


BODIES: dict[str, Body] = {}


def body(
    sizes: tuple[int, ...] = (1, 2, 3), transports: tuple[str, ...] = ("alone", "mpi", "service", "torch")
) -> Callable[[Callable[[World], object]], Callable[[World], object]]:
    """Put a function into the contract."""

    def register(run: Callable[[World], object]) -> Callable[[World], object]:
        BODIES[run.__name__] = Body(run, sizes, transports)
        return run

    return register


def names(transport: str, world_size: int) -> list[str]:
    """The bodies for such a world."""
    return [name for name, one in BODIES.items() if one.runs_in(transport, world_size)]


def as_text(array: NDArray[Any]) -> list[str]:
    """An array as something to compare across ranks."""
    return [array.dtype.name, str(array.shape), array.tobytes().hex()]


def of_rank(rank: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Data of one rank that sum without rounding or overflow."""
    return (np.arange(6).reshape(2, 3) * (rank + 1) % 7).astype(dtype)


def rows_of(rank: int, rows: int = 8, channels: int = 4) -> NDArray[np.float32]:
    """One rank's batch."""
    return np.random.default_rng(rank).standard_normal((rows, channels)).astype(np.float32) + np.float32(10 * rank)
