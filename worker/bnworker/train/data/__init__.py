"""Data sets: where rows are stored, which rows belong to a step, and which rank reads them.

    data = load("digits", world=world)
    for batch in data.batches(batch_size=64, seed=0, epoch=1):
        ...

Read the modules in this order: `loading`, `dataset`, `labels`, `batches`, `ownership`; then those about a shard:
`sources`, `shards`, `arrays`, `files`.
"""

from bnworker.train.data.batches import EpochSteps
from bnworker.train.data.dataset import Batch, Dataset
from bnworker.train.data.labels import are_numbers, spelled
from bnworker.train.data.loading import ACCEPTED, check, examine, from_arrays, load
from bnworker.train.data.problem import DataError, Ranks, raise_on_every_rank
from bnworker.train.data.sources import listed
from bnworker.train.settings import LAST_BATCHES, LastBatch

__all__ = [
    "ACCEPTED",
    "LAST_BATCHES",
    "Batch",
    "DataError",
    "Dataset",
    "EpochSteps",
    "LastBatch",
    "Ranks",
    "are_numbers",
    "check",
    "examine",
    "from_arrays",
    "listed",
    "load",
    "raise_on_every_rank",
    "spelled",
]
