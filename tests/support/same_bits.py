"""The promise, made by real processes: any number of ranks, over any transport, gives one process's bits.

As a script it is one rank, which joins as its environment says and writes what it saw:

    mpiexec -n N python same_bits.py FOLDER [cut]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import bnworker
from bnlayer import BatchNormalization
from bnlayer.collective import Call, Collective, Total
from bnlayer.state import LayerState
from support.families import FAMILIES, draw
from support.layers import gradients

STEPS, ROWS, CHANNELS = 5, 32, 3
SHARDS = {1: (32,), 2: (13, 19), 3: (7, 0, 25), 4: (7, 0, 24, 1)}

Seen = dict[str, list[list[str]]]


POLICIES = ("float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


@dataclass(frozen=True, slots=True)
class Case:
    """A family of data, and what kind of layer sees it."""

    family: str
    dtype: str
    masked: bool
    renorm: bool = False

    @property
    def name(self) -> str:
        """Unique among the cases: the layer's name too."""
        flags = f"{'masked' if self.masked else 'unmasked'}{' renorm' if self.renorm else ''}"
        return f"{self.family} {self.dtype} {flags}"


def cases() -> Iterator[Case]:
    """Every family in both arithmetics, masked and not; the other policies and renorm on what fits them."""
    for family, dtype, masked in product(FAMILIES, ("float32", "float64"), (False, True)):
        yield Case(family, dtype, masked)
    for family, dtype, masked in product(("normal", "lognormal-3"), POLICIES, (False, True)):
        yield Case(family, dtype, masked)
    for family, dtype, masked in product(("normal", "jump"), ("float32", "float64", "mixed_float16"), (False, True)):
        yield Case(family, dtype, masked, renorm=True)


def train(collective: Collective) -> Seen:
    """Train this rank's shard of every case; outputs, gradients and state after each step, as hexadecimal bytes."""
    rows = SHARDS[collective.world_size]
    start = sum(rows[: collective.rank])
    mine = slice(start, start + rows[collective.rank])
    seen: Seen = {}
    for case in cases():
        bn = BatchNormalization(
            synchronized=True,
            name=case.name,
            dtype=case.dtype,
            renorm=case.renorm,
            renorm_clipping={"rmax": 3.0, "dmax": 5.0} if case.renorm else None,
            collective=collective,
        )
        seen[case.name] = []
        data = "float64" if case.dtype == "float64" else "float32"
        for step in range(STEPS):
            x = draw(case.family, 0, step, (ROWS, CHANNELS), data)
            dy = draw("jump", 1, step, (ROWS, CHANNELS), data)
            mask = np.random.default_rng([2, step]).random(ROWS) < (0.7, 1.0, 0.3)[step % 3]
            y = bn(x[mine], training=True, mask=mask[mine] if case.masked else None)
            dx = bn.backward(dy[mine])
            state = [array for what, array in bn.state.arrays().items() if what != "flags"]
            seen[case.name].append([array.tobytes().hex() for array in (y, dx, *gradients(bn), *state)])
    return seen


def union(ranks: list[Seen]) -> Seen:
    """What the ranks saw as one: outputs and input gradients end to end; all else must be equal on all of them."""
    joined: Seen = {}
    for name, steps in ranks[0].items():
        joined[name] = []
        for step, first in enumerate(steps):
            each = [rank[name][step] for rank in ranks]
            assert all(other[2:] == first[2:] for other in each), f"{name}, step {step}: the ranks differ"
            joined[name].append(["".join(one[i] for one in each) for i in (0, 1)] + first[2:])
    return joined


def read(folder: Path, world_size: int) -> list[Seen]:
    """What every rank wrote, in rank order."""
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world_size)]


def cut_out(call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
    """An exchange that exchanges nothing."""
    del call, state
    return Total(limbs)


def main(folder: Path, *, cut: bool) -> None:
    """One rank."""
    with bnworker.join(timeout=120) as world:
        if cut:
            world._transport.exchange = cut_out  # type: ignore[method-assign]  # what the test breaks
        seen = train(world)
        (folder / f"{world.rank}.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), cut="cut" in sys.argv[2:])
