"""A data set on one rank: the shards that it reads, and what all ranks know about all shards.

Shape suffixes: M shards, B rows of a batch, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnworker.train.data.batches import EpochSteps, Indices, shuffled, taken
from bnworker.train.data.ownership import Piece, pieces
from bnworker.train.data.problem import DataError
from bnworker.train.data.shards import Rows
from bnworker.train.settings import LastBatch

# For each shard: the rows to read.
Chosen = Sequence[tuple[Rows, Indices]]

# Rows evaluated at once: enough for an efficient matrix multiplication, and bounded in memory for wide rows.
_CHECKED_ROWS = 4096
_CHECKED_BYTES = 2**25


@dataclass(frozen=True, eq=False)
class Batch:
    """This rank's rows of a step.

    Attributes:
        x: (B, D), of the data set's dtype.
        y: (B,) int64, class numbers: see `Dataset.labels`.
        rows: the number of rows on all ranks in this step.
        problem: the error because of which this rank could not read its rows; x and y are then empty. The step is made
            all the same, so that all ranks make the same exchanges; then `raise_on_every_rank` raises on all of them.
    """

    x: NDArray[Any]
    y: NDArray[np.int64]
    rows: int
    problem: DataError | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """A shard of which this rank reads some rows.

    Attributes:
        piece: this rank's part of any set of the shard's rows.
        given: holds the training and validation rows.
        trained, validating: the numbers of all ranks' training and validation rows in `given`.
        tests: holds the test rows.
        tested: the numbers of all ranks' test rows in `tests`.
    """

    piece: Piece
    given: Rows
    trained: Indices
    validating: Indices
    tests: Rows
    tested: Indices


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training, validation and test rows; each rank reads its own.

    Attributes:
        name: as given to `--data`.
        dtype: of the features: "float32" or "float64".
        features: D.
        labels: ascending; class k of a batch, and output k of a model, stand for `labels[k]`.
        validation_rows, test_rows: their numbers on all ranks.
        fingerprint: of all shards; the same on every machine and for any number of ranks.
        rank, world_size: of the world that it was loaded in.
        sizes: of all shards in bytes; they determine which rank owns which rows.
        rows_M: the number of training rows of every shard, int64.
        parts: the shards that this rank reads.
        ignored: entries of the folder that are not read.
    """

    name: str
    dtype: str
    features: int
    labels: tuple[int, ...]
    validation_rows: int
    test_rows: int
    fingerprint: str
    rank: int
    world_size: int
    sizes: tuple[int, ...]
    rows_M: NDArray[np.int64]
    parts: tuple[Part, ...]
    ignored: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.labels)

    @property
    def rows(self) -> int:
        """The number of training rows on all ranks."""
        return int(self.rows_M.sum())

    def epoch_steps(self, batch_size: int, last_batch: LastBatch | None = None) -> EpochSteps:
        """How the training rows are divided among the steps of an epoch.

        Raises:
            DataError: the epoch would have no steps.
        """
        return EpochSteps(self.rows, batch_size, last_batch or "spread")

    def steps_per_epoch(self, batch_size: int, last_batch: LastBatch | None = None) -> int:
        """How many steps an epoch has.

        Raises:
            DataError: it would have none.
        """
        return self.epoch_steps(batch_size, last_batch).count

    def rows_per_rank(self, world_size: int) -> tuple[int, ...]:
        """How many training rows each rank of a world of this size would read in an epoch."""
        counts = self.rows_M.tolist()
        return tuple(
            sum(len(range(counts[piece.shard])[piece.of(counts[piece.shard])]) for piece in owned)
            for owned in (pieces(self.sizes, rank, world_size) for rank in range(world_size))
        )

    def batches(
        self,
        batch_size: int,
        seed: int,
        epoch: int,
        first: int = 0,
        replica: tuple[int, int] = (0, 1),
        last_batch: LastBatch | None = None,
    ) -> Iterator[Batch]:
        """This rank's batch of every step of an epoch.

        Args:
            batch_size: rows of a step on all ranks, at most.
            seed, epoch: the order of the rows depends on these and on the data.
            first: the number of the first step to return, from 0.
            replica: (index, count): this world takes every count-th row, as one of `count` worlds that train without
                exchanging anything.
            last_batch: see `EpochSteps`; None: "spread".

        Raises:
            DataError: the epoch would have no steps.
        """
        index, count = replica
        steps = self.epoch_steps(batch_size, last_batch)
        for number, chosen in _announced(self._steps(steps, seed, epoch, first), first):
            yield self._batch(_every(chosen, index, count), len(range(index, steps.size(number), count)))

    def training(self) -> Iterator[Batch]:
        """This rank's training rows in blocks, in the order in which they are stored, for evaluation."""
        return self._evaluated([(part.given, part.trained[part.piece.of(len(part.trained))]) for part in self.parts])

    def test(self) -> Iterator[Batch]:
        """This rank's test rows, in blocks."""
        return self._evaluated([(part.tests, part.tested[part.piece.of(len(part.tested))]) for part in self.parts])

    def validation(self) -> Iterator[Batch]:
        """This rank's validation rows, in blocks."""
        return self._evaluated(
            [(part.given, part.validating[part.piece.of(len(part.validating))]) for part in self.parts]
        )

    def _steps(self, steps: EpochSteps, seed: int, epoch: int, first: int) -> Iterator[Chosen]:
        """This rank's rows of each step."""
        orders = [part.trained[shuffled(len(part.trained), seed, epoch, part.piece.shard)] for part in self.parts]
        before_M = taken(self.rows_M, steps.first(first))
        for number in range(first, steps.count):
            after_M = taken(self.rows_M, steps.first(number + 1))
            chosen = []
            for part, order in zip(self.parts, orders, strict=True):
                step = order[before_M[part.piece.shard] : after_M[part.piece.shard]]
                if len(mine := step[part.piece.of(len(step))]):
                    chosen.append((part.given, mine))
            yield chosen
            before_M = after_M

    def _evaluated(self, chosen: Chosen) -> Iterator[Batch]:
        width = self.features * np.dtype(self.dtype).itemsize
        at_once = max(1, min(_CHECKED_ROWS, _CHECKED_BYTES // width))
        blocks = (
            [(rows, indices[start : start + at_once])]
            for rows, indices in chosen
            for start in range(0, len(indices), at_once)
        )
        for _, block in _announced(blocks):
            yield self._batch(block, len(block[0][1]))

    def _batch(self, chosen: Chosen, rows: int) -> Batch:
        y = np.concatenate([np.empty(0, np.int64), *(source.y_N[indices] for source, indices in chosen)])
        x, filled = np.empty((len(y), self.features), self.dtype), 0
        try:
            for source, indices in chosen:
                x[filled : filled + len(indices)] = source.read(indices, self.dtype)
                filled += len(indices)
        except DataError as problem:
            return Batch(x[:0], y[:0], rows, problem)
        return Batch(x, y, rows)


def _announced(reads: Iterable[Chosen], first: int = 0) -> Iterator[tuple[int, Chosen]]:
    """The same, numbered; each is prefetched while the one before it is used."""
    before: Chosen | None = None
    number = first
    for chosen in reads:
        for source, indices in chosen:
            source.x.soon(indices)
        if before is not None:
            yield number, before
            number += 1
        before = chosen
    if before is not None:
        yield number, before


def _every(chosen: Chosen, index: int, count: int) -> Chosen:
    """Every count-th row, from row number `index` on."""
    before, thinned = 0, []
    for source, indices in chosen:
        thinned.append((source, indices[(index - before) % count :: count]))
        before += len(indices)
    return thinned
