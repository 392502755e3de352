"""Records of a job, and state directories that hold them."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bnlayer.agreement import Peer
from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.renorm import Renorm
from bnlayer.state import LayerState
from bnserver.core.events import Replacing
from bnserver.core.journal_records import (
    Began,
    Completed,
    Ended,
    JournalRecord,
    LayerSnapshot,
    Left,
    MemberRecord,
    Pushed,
)
from bnserver.core.reasons import Reason
from bnserver.journal_encoding import encode
from bnserver.store import Store


def state_of(dtype: str, channels: int) -> LayerState:
    """A state of extreme numbers."""
    grid = Grid(dtype, np.linspace(-1e30, 3, channels), np.arange(channels) - 160, True)
    backward = BackwardGrid(dtype, np.arange(channels), np.arange(channels) - 5, False)
    mean = np.linspace(-1, 1, channels).astype(dtype)
    return LayerState(Moving(mean, mean**2), grid, backward, 2**40)


SIGNATURE = LayerSignature(1, "float32", 0.9, 0.001, renorm=Renorm(0.9, rmax=3.0))
ENROLLED = Completed(
    2**40, Call(Operation.ENROLL, ExchangeKey("a", None, 0), SIGNATURE), state_of("float32", 1), known=True
)
SUMS = Completed(
    7,
    Call(
        Operation.SUMS,
        ExchangeKey("ü", Direction.BACKWARD, 3),
        replace(SIGNATURE, grid=2**62, update_moving=False),
        2,
        7,
    ),
    np.array([[-(2**63)], [2**63 - 1]]),
)
SET = Completed(
    8,
    Call(Operation.PROBE, ExchangeKey("ü", Direction.FORWARD, 3), replace(SIGNATURE, state=2**62)),
    Replacing(np.array([[5], [-6]]), state_of("float32", 1)),
)
SNAPSHOT: list[JournalRecord] = [
    Ended(2, Reason.DATA_LOSS, "text ü", (0, 3)),
    LayerSnapshot("a", state_of("float32", 1)),
    Began(3, 2, (MemberRecord(Peer(0, "h", 7), 2**63 - 1, 300.0, 4), MemberRecord(Peer(1, "h", 8), 5, 0.25))),
]
JOURNAL: list[JournalRecord] = [
    ENROLLED,
    SUMS,
    SET,
    Pushed(1, 9, "b\n", state_of("float64", 3)),
    Left(3, 1, ""),
    Ended(3),
]


def same(got: Sequence[JournalRecord], expected: Sequence[JournalRecord]) -> bool:
    """Whether entries are equal, bits included: their bytes are."""
    return list(map(encode, got)) == list(map(encode, expected))


def written(
    directory: Path, job: str = "j", snapshot: Sequence[JournalRecord] = (), journal: Sequence[JournalRecord] = ()
) -> Path:
    """A state directory as a daemon leaves it; returns the job's file."""
    store = Store(directory)
    store.load()
    if snapshot:
        asyncio.run(store.save(job, lambda: snapshot))
    for record in journal:
        store.append(job, record)
    store.close()
    return store.path(job)


def all_loaded(directory: Path) -> dict[str, list[JournalRecord]]:
    """What the next daemon loads."""
    store = Store(directory)
    try:
        return store.load()
    finally:
        store.close()
