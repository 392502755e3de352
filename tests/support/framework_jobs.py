"""Jobs of 1 to 3 ranks of one framework, side by side, and what their ranks wrote: see `tests/adapters/*_rank.py`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.adapters import Ended, run

Arrays = dict[str, NDArray[Any]]


def launch(
    world_size: int, script: Path, *arguments: str | Path, environ: Mapping[str, str], transport: str = "service"
) -> Ended:
    """Run a script on so many ranks, beside a service of their own or under mpiexec."""
    options = ["-n", str(world_size), f"--transport={transport}", "--", sys.executable]
    return run(
        [sys.executable, "-m", "bnworker.cli", "launch", *options, script, *arguments],
        environ={"TF_CPP_MIN_LOG_LEVEL": "3", **environ},
        limit_s=400,
    )


@dataclass(frozen=True)
class Jobs:
    """One job for each number of ranks.

    Attributes:
        folder: what the ranks wrote.
        ended: how the jobs ended, by number of ranks.
    """

    folder: Path
    ended: dict[int, Ended]

    @classmethod
    def run(
        cls,
        script: Path,
        folder: Path,
        parts: Mapping[int, Sequence[str]],
        environ: Mapping[str, str] | None = None,
        transport: str = "service",
    ) -> Jobs:
        """Run them all, with the parts of the script that each is to run."""
        with ThreadPoolExecutor(len(parts)) as pool:
            jobs = {
                size: pool.submit(launch, size, script, folder, *names, environ=environ or {}, transport=transport)
                for size, names in parts.items()
            }
        return cls(folder, {world_size: job.result() for world_size, job in jobs.items()})

    def ranks(self, part: str, world_size: int) -> list[Arrays]:
        """What the ranks of a job saw in a part."""
        assert self.ended[world_size].code == 0, self.ended[world_size].err
        return [dict(np.load(self.folder / f"{part}-{world_size}-{rank}.npz")) for rank in range(world_size)]

    def union(self, part: str, world_size: int) -> Arrays:
        """The same as one: outputs (y) and input gradients (dx) end to end; all else must be equal on all ranks."""
        each = self.ranks(part, world_size)
        joined = {}
        for name, first in each[0].items():
            if name.rpartition("_")[2].startswith(("y", "dx")):
                joined[name] = np.concatenate([rank[name] for rank in each])
            else:
                assert all(np.array_equal(rank[name], first) for rank in each), f"{name}: the ranks differ"
                joined[name] = first
        return joined


def differing(got: Arrays, expected: Arrays) -> list[str]:
    """The names of arrays whose bits differ."""
    assert got.keys() == expected.keys()
    return [name for name, want in expected.items() if got[name].tobytes() != want.tobytes()]


def assert_close(got: Arrays, expected: Arrays, wide: float) -> None:
    """Compare with |got − expected| / (1 + |expected|): 1e-5, in float64 `wide`."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        error = np.max(np.abs(got[name] - want) / (1 + np.abs(want)))
        assert error <= (wide if name.startswith("float64") else 1e-5), f"{name}: {error}"
