"""Which rank reads which rows; a pure function, so the same sizes give the same result on every rank.

With at least as many shards as ranks, a rank owns whole, consecutive shards: all bytes are divided into equal parts,
one for each rank, and a shard belongs to the rank whose part contains the shard's middle. With fewer shards than
ranks, the parts cut through shards: a rank whose part covers the share a … b of a shard takes, of each step's c rows
of that shard, the rows from ⌊a·c⌋ to ⌊b·c⌋. Sizes are those of the files, which are known before a file is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's part of a shard: from start/denominator to stop/denominator of any set of its rows."""

    shard: int
    start: int = 0
    stop: int = 1
    denominator: int = 1

    def of(self, rows: int) -> slice:
        """The rows of this piece among so many rows; over all ranks, every row belongs to one piece."""
        return slice(rows * self.start // self.denominator, rows * self.stop // self.denominator)


def pieces(sizes: Sequence[int], rank: int, world_size: int) -> tuple[Piece, ...]:
    """The pieces that a rank reads, in the order of the shards; possibly none.

    Args:
        sizes: of the shards, in bytes; each at least 1.
        rank: from 0.
        world_size: the number of ranks.
    """
    total, ends = sum(sizes), list(accumulate(sizes))
    spans = [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    if len(sizes) >= world_size:
        owners = [(start + end) * world_size // (2 * total) for start, end in spans]
        return tuple(Piece(shard) for shard, owner in enumerate(owners) if owner == rank)
    owned = []
    for shard, (start, end) in enumerate(spans):
        # In units of 1/world_size byte, so that every border is an integer.
        first, last = start * world_size, end * world_size
        low, high = max(first, rank * total), min(last, (rank + 1) * total)
        if low < high:
            owned.append(Piece(shard, low - first, high - first, last - first))
    return tuple(owned)
