"""What reading rows costs: time of it per step, and memory per rank, with shards of a million rows of 784 features.

    python benchmarks/input.py FOLDER --ranks 2 [--stored uint8|float32] [--rows 1000000] [--steps 200] [--cold]

The shards are made in FOLDER if it is empty: uint8 takes 0.8 GB, float32 3.1 GB. With --cold the system is told
to forget them before the run, so that the disk is measured too.

A rank prints one JSON line:

* reading_share: time spent reading, over the time of all steps; the first step, which shuffles, included.
* reading_ms, step_ms: medians over the steps.
* peak_mb: the most memory this process had; before_mb: when everything was imported and joined.
* working_set_mb: what a rank holds of its rows at once: the rows as stored and as floats of a block of 4,096.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

FEATURES, CLASSES = 784, 10
_PARTS = (0.15, 0.05, 0.3, 0.1, 0.15, 0.25)  # six shards, the largest six times the smallest
_TESTS = 500  # of each shard
_BLOCK = 4096  # rows that are judged at once


def make(folder: Path, rows: int, stored: str) -> None:
    """Write the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, part in enumerate(_PARTS):
        count = round(rows * part)
        pixels = [rng.integers(0, 256, (n, FEATURES), np.uint8).astype(stored) for n in (count, _TESTS)]
        labels = [rng.integers(0, CLASSES, n) for n in (count, _TESTS)]
        np.savez(folder / f"{number}.npz", x=pixels[0], y=labels[0], x_test=pixels[1], y_test=labels[1])


def forget(folder: Path) -> None:
    """Let the system drop what it has of the shards in memory."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def memory_mb(what: str) -> float:
    """A field of this process's status: VmRSS, or VmHWM, its greatest so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024, 1)


def rank(folder: str, batch_size: int, steps: int) -> None:
    """Train as one of the ranks."""
    import bnworker
    from bnworker.train.data import load
    from bnworker.train.events import Step
    from bnworker.train.loop import train
    from bnworker.train.settings import Settings

    made: list[Step] = []
    with bnworker.join() as world:
        before = memory_mb("VmRSS")
        data = load(folder, world=world)
        settings = Settings(epochs=1, batch_size=batch_size, steps=steps, learning_rate=0.01)
        train(settings, data, world, watch=lambda event: made.append(event) if isinstance(event, Step) else None)
        width = FEATURES * (4 + data.parts[0].given.x.dtype.itemsize)
        figures = {
            "rank": world.rank,
            "rows": data.rows,
            "own_rows": data.rows_per_rank(world.world_size)[world.rank],
            "batch_size": batch_size,
            "steps": len(made),
            "reading_share": round(sum(s.reading_seconds for s in made) / sum(s.seconds for s in made), 4),
            "reading_ms": round(1e3 * statistics.median(s.reading_seconds for s in made), 3),
            "step_ms": round(1e3 * statistics.median(s.seconds for s in made), 3),
            "before_mb": before,
            "peak_mb": memory_mb("VmHWM"),
            "working_set_mb": round(_BLOCK * width / 2**20, 1),
        }
    print(json.dumps(figures), flush=True)


def main() -> None:
    """Make the shards, and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stored", choices=["uint8", "float32"], default="uint8")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args()
    if "BNLAYER_RANK" in os.environ:
        rank(str(given.folder), given.batch_size, given.steps)
        return
    if not given.folder.exists() or not any(given.folder.iterdir()):
        make(given.folder, given.rows, given.stored)
    if given.cold:
        forget(given.folder)
    command = [sys.executable, "-m", "bnworker.cli", "launch", "-n", str(given.ranks), "--"]
    subprocess.run([*command, sys.executable, *sys.argv], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
