"""What a rank of a fault test saw: a line of JSON for each exchange, written when it is complete.

A record names the exchange, what this rank put in and what came out, so that `model` can say from the records of all
ranks whether something was lost, counted twice, or told differently to two of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.collective import Call, Total
from bnlayer.state import LayerState
from bnworker import World

Op = Literal["enroll", "probe", "sums", "allreduce", "broadcast", "barrier", "push", "pull"]


@dataclass(frozen=True)
class Record:
    """One completed exchange of one rank.

    Attributes:
        op: the operation.
        layer: its layer; "" for a plain operation.
        direction: "forward" or "backward"; "" for what has none.
        step, attempt: its place, as the rank counts.
        sent, got: what went in and what came out, as hexadecimal bytes.
        version: the owner's, after it; -1 where none is told.
        begin, end: seconds on the machine's monotonic clock.
        set: the statistics that the rank set since the layer's last exchange; "" if it did not.
    """

    op: Op
    layer: str
    direction: str
    step: int
    attempt: int
    sent: str
    got: str
    version: int
    begin: float
    end: float
    set: str = ""

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What it is called: equal on every rank."""
        return self.op, self.layer, self.direction, self.step, self.attempt

    def __str__(self) -> str:
        where = f"{self.layer} {self.direction}".strip() or "plain"
        return f"{self.op} {where} step {self.step} round {self.attempt}"


def limbs(hexadecimal: str, channels: int) -> list[list[int]]:
    """The words of a record, row by row."""
    return [list(map(int, row)) for row in np.frombuffer(bytes.fromhex(hexadecimal), "<i8").reshape(-1, channels)]


def floats(hexadecimal: str) -> NDArray[np.float32]:
    """The numbers of a record."""
    return np.frombuffer(bytes.fromhex(hexadecimal), "<f4")


def statistics(state: LayerState) -> str:
    """A layer's moving mean and variance as a record holds them."""
    return (state.moving.mean.tobytes() + state.moving.variance.tobytes()).hex()


def digest(array: NDArray[Any]) -> str:
    """A large array, told short."""
    return blake2b(array.tobytes(), digest_size=16).hexdigest()


def read(path: Path) -> list[Record]:
    """The records of a rank; a last line that a killed rank did not finish is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Record(**json.loads(line)) for line in lines if line.endswith("\n")]


class Recorder:
    """A `Collective` that notes down what passes; layers are given it instead of the world.

    Args:
        world: where the exchanges are made.
        path: of the history; None: nothing is written.
        before: called with the number of exchanges so far before each of them.
    """

    def __init__(self, world: World, path: Path | None, before: Callable[[int], None]) -> None:
        self.rank = world.rank
        self.world_size = world.world_size
        self.exchanges = 0
        self._world = world
        self._before = before
        self._file = path.open("a", encoding="utf-8") if path is not None else None

    def enroll(self, call: Call, state: LayerState) -> LayerState:
        """Make a layer known."""
        begin = self._begins()
        owned = self._world.enroll(call, state)
        self._note("enroll", call, begin, statistics(state), statistics(owned), owned.version)
        return owned

    def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
        """Reduce words; the owner takes over the state that the ranks set."""
        sent = limbs.tobytes().hex()
        begin = self._begins()
        total = self._world.exchange(call, limbs, state)
        version = total.version if total.version is not None else -1
        op: Op = "probe" if call.operation.value == "probe" else "sums"
        set_ = statistics(state) if state is not None else ""
        self._note(op, call, begin, sent, total.limbs.tobytes().hex(), version, set_)
        return total

    def pull(self, layer: str) -> LayerState | None:
        """Nothing of a layer's own is pulled: `fetch` does it."""
        del layer
        return None

    def fetch(self, bn: BatchNormalization, step: int) -> None:
        """Pull a layer's statistics into it."""
        begin = self._begins()
        state = self._world.pull(bn)
        assert state is not None
        self._write("pull", bn.name, step, begin, "", statistics(state), state.version)

    def replace(self, bn: BatchNormalization, step: int) -> None:
        """Make a layer's statistics the owner's."""
        begin = self._begins()
        sent = statistics(bn.state)
        self._world.push(bn)
        self._write("push", bn.name, step, begin, sent, statistics(bn.state), bn.state.version)

    def allreduce(self, array: NDArray[np.float32], step: int) -> None:
        """Add small floats, in rank order."""
        begin = self._begins()
        (total,) = self._world.allreduce([array])
        self._write("allreduce", "", step, begin, array.tobytes().hex(), total.tobytes().hex())

    def allreduce_large(self, array: NDArray[np.float64], step: int) -> NDArray[np.float64]:
        """Add an array that travels in parts; told by digests alone, `model` draws it anew."""
        begin = self._begins()
        (total,) = self._world.allreduce([array])
        self._write("allreduce", "large", step, begin, digest(array), digest(total))
        return total

    def broadcast(self, array: NDArray[np.float32], root: int, step: int) -> None:
        """Give everyone the root's array."""
        begin = self._begins()
        (got,) = self._world.broadcast([array], root=root)
        self._write("broadcast", f"of {root}", step, begin, array.tobytes().hex(), got.tobytes().hex())

    def barrier(self, step: int, layer: str = "") -> None:
        """Meet."""
        begin = self._begins()
        self._world.barrier()
        self._write("barrier", layer, step, begin, "", "")

    def _begins(self) -> float:
        self._before(self.exchanges)
        self.exchanges += 1
        return time.monotonic()

    def _note(self, op: Op, call: Call, begin: float, sent: str, got: str, version: int, set_: str = "") -> None:
        key = call.key
        record = Record(
            op,
            key.layer or "",
            key.direction or "",
            key.step,
            call.attempt,
            sent,
            got,
            version,
            begin,
            time.monotonic(),
            set_,
        )
        self._put(record)

    def _write(self, op: Op, layer: str, step: int, begin: float, sent: str, got: str, version: int = -1) -> None:
        self._put(Record(op, layer, "", step, 0, sent, got, version, begin, time.monotonic()))

    def _put(self, record: Record) -> None:
        if self._file is not None:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()


def first_after(records: Sequence[Record], moment: float) -> float | None:
    """When the first exchange after a moment was complete."""
    return next((record.end for record in records if record.end >= moment), None)
