"""The rows of a step, computed from numbers alone: this module knows no ranks, worlds or files.

Laws:
1. The split into training, validation and test rows depends on the data alone.
2. The rows of a step depend on (seed, epoch, step) alone.
3. Every row is used once in an epoch, except for those that `drop` leaves out; no step has more rows than asked for.

Shape suffixes: M shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bnworker.train.data.problem import DataError
from bnworker.train.settings import LastBatch

TEST_SHARE = 0.2  # of the rows, where no test rows are given
ROWS_AT_MOST = math.isqrt(2**63 - 1) - 1  # products of two numbers of rows, and a phase, are int64

_SPLIT_SEED = 1797  # any fixed number would do; this one is the rows of the digits
_GOLDEN = 2654435769  # 2**32 divided by the golden ratio

Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class EpochSteps:
    """How the N rows of an epoch are divided among its S steps, of at most B rows each.

        spread    S = ⌈N/B⌉    first(k) = ⌊k·N/S⌋        sizes that differ by one at most
        keep      S = ⌈N/B⌉    first(k) = min(k·B, N)    the last step takes the remaining rows
        drop      S = ⌊N/B⌋    first(k) = k·B            the remaining rows are not used in this epoch

    Only one or two rows may remain. Their variance is far from that of all rows, and such a step at the end of every
    epoch degrades a trained model: therefore "spread" is the default.

    Attributes:
        rows: N.
        batch_size: B.
        last_batch: "spread", "keep" or "drop".

    Raises:
        DataError: the epoch would have no steps.
    """

    rows: int
    batch_size: int
    last_batch: LastBatch = "spread"

    def __post_init__(self) -> None:
        if not self.count:
            raise DataError(
                f"--last-batch drop: the {self.rows:,} rows to train on are fewer than --batch-size "
                f"{self.batch_size:,}, which leaves no step: expected spread or keep, or a smaller batch size."
            )

    @property
    def count(self) -> int:
        """S, the number of steps."""
        return self.rows // self.batch_size if self.last_batch == "drop" else -(-self.rows // self.batch_size)

    def first(self, step: int) -> int:
        """The number of the step's first row, of those of the epoch; `first(S)` is where the last step ends."""
        if self.last_batch == "spread":
            return step * self.rows // self.count
        return min(step * self.batch_size, self.rows)

    def size(self, step: int) -> int:
        """The rows of a step."""
        return self.first(step + 1) - self.first(step)

    @property
    def largest(self) -> int:
        """The rows of the largest step."""
        return -(-self.rows // self.count) if self.last_batch == "spread" else min(self.batch_size, self.rows)

    @property
    def smallest(self) -> int:
        """The rows of the smallest step."""
        return self.rows // self.count if self.last_batch == "spread" else self.size(self.count - 1)

    @property
    def left_out(self) -> int:
        """The rows of an epoch that no step takes."""
        return self.rows - self.first(self.count)


def taken(rows_M: NDArray[np.int64], first: int) -> NDArray[np.int64]:
    """How many rows of each shard are among the first `first` rows of an epoch.

    The rows of every shard are spread evenly over the epoch. With phases φ of 0, shards of the same size would
    contribute their rows in the same steps; multiples of the golden ratio distribute them, for neighbouring shards as
    well, so that the ranks that own them have equal work in every step.

        c_s(θ) = ⌊n_s·θ/N + φ_s⌋        φ_s = s/golden ratio mod 1        N = Σ n_s

    θ is the largest number with Σ c_s(θ) ≤ first. The rows that are then missing are taken from the shards whose next
    row comes soonest, in their order.

    Args:
        rows_M: n_s, of every shard.
        first: from 0 to N.

    Returns:
        (M,), with the sum `first`; no element decreases when `first` increases. A single shard gives `first` rows.
    """
    total, shards = int(rows_M.sum()), len(rows_M)
    if first >= total:
        return rows_M
    phases_M = np.array([(shard * _GOLDEN % 2**32) * total >> 32 for shard in range(shards)], np.int64)

    def given(theta: int) -> NDArray[np.int64]:
        return (rows_M * theta + phases_M) // total

    # |Σ c_s(θ) − θ| < M, which brackets the search.
    low, high = max(0, first - shards), min(total, first + shards + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if given(middle).sum() <= first else (low, middle)
    now_M = given(low)
    next_M = given(low + 1) - now_M
    before_M = np.cumsum(next_M) - next_M
    missing = first - int(now_M.sum())
    taken_M: NDArray[np.int64] = now_M + np.clip(missing - before_M, 0, next_M)
    return taken_M


def shuffled(rows: int, seed: int, epoch: int, shard: int) -> Indices:
    """The order in which an epoch takes a shard's training rows."""
    return np.random.default_rng([seed, epoch, shard]).permutation(rows)


def shares(share: float, rows_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """A share of every shard's rows, (M,); rounding errors are carried to the next shard.

    a_s = ⌊share·N_s + ½⌋ − ⌊share·N_(s−1) + ½⌋        N_s = n_0 + … + n_s
    """
    ends_M = np.floor(share * np.cumsum(rows_M) + 0.5).astype(np.int64)
    shares_M: NDArray[np.int64] = np.minimum(np.diff(ends_M, prepend=0), rows_M)
    return shares_M


def split(rows: int, shard: int, *, tests: int, validations: int) -> tuple[Indices, Indices, Indices]:
    """Draw a shard's training, validation and test rows.

    Args:
        rows: the number of this shard's rows.
        shard: its number, the seed of the draw.
        tests, validations: how many rows of each kind are drawn.

    Returns:
        Row numbers of training, validation and test rows, disjoint and complete; the last two ascending, because they
        are read in order.
    """
    order = np.random.default_rng([_SPLIT_SEED, shard]).permutation(rows)
    tested, validating, trained = np.split(order, [tests, tests + validations])
    return trained, np.sort(validating), np.sort(tested)
