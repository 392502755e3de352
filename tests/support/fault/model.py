"""A statistics service of two hundred lines that can't fail: what must have come of what the ranks put in.

It takes the histories of all ranks of a job and walks through them once, in order: it adds the words, applies the
moving update once to each completed forward exchange, and compares. Its formulas are those of docs/exact-sums.md,
written down anew, one channel at a time: a fault that the product's own functions share would else not be seen.

What it finds is told as lines of text. No line means that nothing was lost, nothing was counted twice, nobody was
told anything else than the others, and versions have no gap.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from support.fault.history import Record, digest, floats, limbs
from support.fault.program import CHANNELS, EPSILON, MOMENTUM, large

_LOWEST = -160  # the exponent of a channel without any range
_SHOWN = 20  # of what is wrong: the first lines tell, the rest follows from them
_ALONE = ("push", "pull")  # what a rank does by itself; all else is done by all ranks

Owned = tuple[str, int]
"""The statistics of a layer, as a record holds them, and its version."""


@dataclass
class Layer:
    """One layer as the owner must hold it; a list has an entry a channel.

    Attributes:
        mean, variance: the moving ones, each a float32 number.
        version: the owner's.
        pivot, exponent: the grid.
        need: the channels that the next probe regrids.
        probed: whether this exchange had its probe.
        set: what all ranks set, until the exchange that says so is complete.
    """

    mean: list[float]
    variance: list[float]
    version: int = 0
    pivot: list[float] = field(default_factory=lambda: [0.0] * CHANNELS)
    exponent: list[int] = field(default_factory=lambda: [_LOWEST] * CHANNELS)
    need: list[bool] = field(default_factory=lambda: [True] * CHANNELS)
    probed: bool = False
    set: str = ""

    @property
    def owned(self) -> Owned:
        """As it is told."""
        return np.array(self.mean + self.variance, "<f4").tobytes().hex(), self.version

    def take(self, statistics: str, version: int) -> None:
        """Replace the moving statistics."""
        both = [float(value) for value in floats(statistics)]
        self.mean, self.variance, self.version = both[:CHANNELS], both[CHANNELS:], version

    def forward(self, op: str, total: list[list[int]]) -> None:
        """Take the limbs of all ranks in one round of a forward exchange."""
        if op == "probe":
            for c in range(CHANNELS):
                if self.need[c]:
                    self._regrid(c, _from_key(total[0][c]), -_from_key(total[1][c]))
            self.probed = True
            return
        batch = [self._moments(c, [row[c] for row in total]) for c in range(CHANNELS)]
        refused = [needs_probe for _, _, needs_probe in batch]
        if any(refused) and not self.probed:
            self.need = refused
            return
        self.commit()
        self.mean = [_moved(old, new) for old, (new, _, _) in zip(self.mean, batch, strict=True)]
        self.variance = [_moved(old, new) for old, (_, new, _) in zip(self.variance, batch, strict=True)]
        self.version += 1
        self.probed = False

    def commit(self) -> None:
        """Take what was set: the exchange that said so is complete."""
        if self.set:
            self.take(self.set, self.version)
        self.set = ""

    def _regrid(self, c: int, highest: float, lowest: float) -> None:
        self.pivot[c] = 0.0 if lowest <= 0.0 <= highest else _single(highest / 2 + lowest / 2)
        half = max(highest - self.pivot[c], self.pivot[c] - lowest)
        self.exponent[c] = math.frexp(half)[1] + 5 if half > 0 else _LOWEST

    def _moments(self, c: int, limbs: list[int]) -> tuple[float, float, bool]:
        """The batch's mean and variance, and whether the grid does not do for it."""
        s, t, n, flags = (limbs[0] << 32) + limbs[1], (limbs[2] << 32) + limbs[3], limbs[4], limbs[5]
        w = self.exponent[c]
        unit = math.ldexp(1.0, 2 * w - 52)
        a = float(s) * math.ldexp(1.0, w - 46) / n
        spread = max(float(t) * unit / n - a * a, 0.0)
        finest = max(unit, abs(a) * math.ldexp(1.0, w - 47))
        coarse = spread + EPSILON < finest * min(2.0**22, 2.0**42 / n) and w > _LOWEST
        return self.pivot[c] + a, spread, flags >> 32 > 0 or coarse


def check(histories: Sequence[Sequence[Record]], owner: Mapping[str, Owned] | None = None) -> list[str]:
    """Judge the histories of all ranks of one job.

    Args:
        histories: in rank order, from the job's first exchange on.
        owner: what the service holds of each layer in the end; None: it is not looked at.

    Returns:
        What is wrong, a line each; empty if nothing is.
    """
    wrong = _out_of_order(histories)
    if wrong:
        return wrong
    walk = _Walk()
    for _ in walk.through(histories):
        pass
    if owner is not None:
        walk.equal("the layers that the service holds", set(owner), set(walk.layers))
        for name, layer in walk.layers.items():
            walk.equal(f"what the service holds of {name} in the end", owner.get(name), layer.owned)
    return walk.wrong[:_SHOWN]


def timeline(*runs: Sequence[Sequence[Record]]) -> list[dict[str, Owned]]:
    """All that the service held, one state after the other, while the ranks of a job saw this.

    Args:
        runs: of the job, one after the other: the histories of all ranks, in order. Where one of them ends early, the
            run does.
    """
    walk = _Walk()
    states: list[dict[str, Owned]] = [{}]
    for histories in runs:
        for _ in walk.through(histories):
            now = {name: layer.owned for name, layer in walk.layers.items()}
            if now != states[-1]:
                states.append(now)
    assert not walk.wrong, walk.wrong
    return states


class _Walk:
    """The one pass through all histories."""

    def __init__(self) -> None:
        self.layers: dict[str, Layer] = {}
        self.wrong: list[str] = []

    def equal(self, what: str, received: object, expected: object) -> None:
        """Note down a difference."""
        if received != expected:
            self.wrong.append(f"{what}: expected {expected}, found {received}")

    def through(self, histories: Sequence[Sequence[Record]]) -> Iterator[None]:
        """Walk through the histories of all ranks; a stop after each step."""
        joint = [[record for record in history if record.op not in _ALONE] for history in histories]
        alone = [_alone(history) for history in histories]
        for number, records in enumerate(zip(*joint, strict=False)):
            self.by_themselves([record for own in alone for record in own.get(number, ())])
            yield
            self.together(records)
            yield
        self.by_themselves([record for own in alone for record in own.get(min(map(len, joint)), ())])
        yield

    def by_themselves(self, records: Sequence[Record]) -> None:
        """What ranks did between two exchanges: one pushes, or some pull."""
        for record in sorted(records, key=lambda record: record.op, reverse=True):
            layer = self.layers[record.layer]
            if record.op == "push":
                layer.take(record.sent, layer.version + 1)
            self.equal(f"{record}: what the owner answered", (record.got, record.version), layer.owned)

    def together(self, records: Sequence[Record]) -> None:
        """One exchange of all ranks."""
        first = records[0]
        if first.op == "enroll":
            if first.layer not in self.layers:
                self.layers[first.layer] = Layer([], [])
                self.layers[first.layer].take(first.sent, 0)
            self.layers[first.layer].set = ""  # of an exchange that an earlier run did not complete
            expected, version = self.layers[first.layer].owned
        elif first.op in ("probe", "sums"):
            total = _total(first.op, [limbs(record.sent, CHANNELS) for record in records])
            layer = self.layers[first.layer]
            for rank, record in enumerate(records):
                self.equal(f"{record}: what rank {rank} set", record.set, first.set)
            layer.set = first.set or layer.set
            if first.direction == "forward":
                layer.forward(first.op, total)
            expected, version = np.array(total, "<i8").tobytes().hex(), layer.version
        else:
            expected, version = self._plain(records), -1
        for rank, record in enumerate(records):
            self.equal(f"{record}: what came out on rank {rank}", record.got, expected)
            self.equal(f"{record}: the version told to rank {rank}", record.version, version)

    def _plain(self, records: Sequence[Record]) -> str:
        first = records[0]
        match first.op:
            case "allreduce" if first.layer:
                drawn = [large(rank, first.step) for rank in range(len(records))]
                for rank, (record, array) in enumerate(zip(records, drawn, strict=True)):
                    self.equal(f"{record}: what rank {rank} put in", record.sent, digest(array))
                return digest(sum(drawn[1:], start=drawn[0]))
            case "allreduce":
                arrays = [floats(record.sent).astype(np.float64) for record in records]
                return sum(arrays[1:], start=arrays[0]).astype("<f4").tobytes().hex()
            case "broadcast":
                return records[int(first.layer.removeprefix("of "))].sent
            case _:
                return ""


def _out_of_order(histories: Sequence[Sequence[Record]]) -> list[str]:
    """Exchanges that are missing, doubled or swapped."""
    wrong = [line for rank, history in enumerate(histories) for line in _gaps(rank, history)]
    joint = [[record for record in history if record.op not in _ALONE] for history in histories]
    for number, records in enumerate(zip_longest(*joint)):
        if len({record.key if record else None for record in records}) > 1:
            seen = "; ".join(f"rank {rank} has {record or 'none'}" for rank, record in enumerate(records))
            return [*wrong, f"exchange {number}: {seen}"][:_SHOWN]
    return wrong[:_SHOWN]


def _gaps(rank: int, history: Sequence[Record]) -> list[str]:
    """Where the exchanges of a layer do not follow each other one by one; and what is there twice."""
    wrong, last, seen = [], dict[tuple[str, str], Record](), set[object]()
    for record in history:
        if record.key in seen:
            wrong.append(f"rank {rank} has {record} twice")
        seen.add(record.key)
        if record.direction:
            key = record.layer, record.direction
            before = last.get(key)
            if (record.step, record.attempt) not in _next(before):
                wrong.append(f"rank {rank} has {record} after {before or 'nothing'}")
            last[key] = record
    return wrong


def _next(record: Record | None) -> tuple[tuple[int, int], ...]:
    """The steps and rounds that may follow in one direction of a layer; sums follow a probe."""
    if record is None:
        return ((0, 0),)
    retried = record.step, record.attempt + 1
    return (retried,) if record.op == "probe" else (retried, (record.step + 1, 0))


def _alone(history: Sequence[Record]) -> dict[int, list[Record]]:
    """What a rank did by itself, by the number of exchanges that came before."""
    records: dict[int, list[Record]] = {}
    number = 0
    for record in history:
        if record.op in _ALONE:
            records.setdefault(number, []).append(record)
        else:
            number += 1
    return records


def _total(op: str, contributed: Sequence[list[list[int]]]) -> list[list[int]]:
    reduce = max if op == "probe" else sum
    return [[reduce(column) for column in zip(*rows, strict=True)] for rows in zip(*contributed, strict=True)]


def _moved(old: float, batch: float) -> float:
    return _single(old * MOMENTUM + batch * (1.0 - MOMENTUM))


def _single(number: float) -> float:
    """Rounded to float32."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def _from_key(key: int) -> float:
    """The float32 number of a probe's key: integers in the order of the numbers."""
    return float(struct.unpack("<f", struct.pack("<i", key ^ ((key >> 31) & 0x7FFF_FFFF)))[0])
