"""Shards to train on, and ranks that are threads and read them together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

T = TypeVar("T")

_REDUCED = {"sum": np.add, "max": np.maximum, "min": np.minimum}


def rows(count: int, first: int = 0, features: int = 4, classes: int = 3) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Features whose first column numbers the rows of all shards, and labels that a line can tell apart."""
    y = (np.arange(count) + first) % classes
    x = np.random.default_rng([7, first]).standard_normal((count, features)).astype("float32")
    x += 3 * np.eye(classes, features, dtype="float32")[y]
    x[:, 0] = np.arange(first, first + count)
    return x, y


def write(
    folder: Path, sizes: Sequence[int], kind: Literal["npz", "compressed", "npy"] = "npz", features: int = 4
) -> Path:
    """A folder of shards of these sizes; their rows are numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        x, y = rows(size, sum(sizes[:number]), features)
        if kind == "npy":
            np.save(folder / f"x-{number}.npy", x)
            np.save(folder / f"y-{number}.npy", y)
        else:
            (np.savez if kind == "npz" else np.savez_compressed)(folder / f"{number}.npz", x=x, y=y)
    return folder


@dataclass
class Table:
    """Where the ranks of `together` meet."""

    world_size: int
    given: dict[int, Any] = field(default_factory=dict)
    exchanges: int = 0
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world_size, timeout=120)

    def meet(self, rank: int, given: Any) -> list[Any]:
        """What all ranks said, in rank order."""
        self.given[rank] = given
        self.barrier.wait()
        all_given = [self.given[one] for one in range(self.world_size)]
        self.exchanges += rank == 0
        self.barrier.wait()
        return all_given


@dataclass
class Reader:
    """One of the ranks: what reading together needs of a world."""

    rank: int
    world_size: int
    table: Table

    def allreduce(self, arrays: Iterable[ArrayLike], op: Literal["sum", "max", "min"] = "sum") -> list[NDArray[Any]]:
        """Element by element over all ranks."""
        given = self.table.meet(self.rank, [np.asarray(array) for array in arrays])
        return [np.asarray(_REDUCED[op].reduce(np.stack(column))) for column in zip(*given, strict=True)]

    def broadcast(self, arrays: Iterable[ArrayLike] | None = None, root: int = 0) -> list[NDArray[Any]]:
        """The root's arrays."""
        given = self.table.meet(self.rank, None if arrays is None else [np.asarray(array) for array in arrays])
        return list(given[root])


def together(world_size: int, body: Callable[[Reader], T]) -> list[T | Exception]:
    """Run a body on every rank; its results, or what it raised, in rank order."""
    table = Table(world_size)
    results: list[Any] = [AssertionError("this rank hangs")] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = body(Reader(rank, world_size, table))
        except Exception as error:  # noqa: BLE001 - a thread's exception is one of the results
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    return results


def all_well(results: Sequence[T | Exception]) -> list[T]:
    """The results; the first exception is raised."""
    good = []
    for result in results:
        if isinstance(result, Exception):
            raise result
        good.append(result)
    return good
