"""A fresh process: the seconds of its import and first calls.

    python -m benchmarks.starting        in a process of its own; prints JSON

First calls are a training call, its backward and an inference, channels last and first. What the interpreter itself
needs before it runs a line is not counted. Figures:

    starting/import, starting/first calls, starting/seconds    the first quartile over processes
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path


def this_process() -> dict[str, float]:
    """Import and call, with the clock running."""
    start = time.perf_counter()
    import numpy as np

    from bnlayer import BatchNormalization

    imported = time.perf_counter()
    x = np.ones((8, 7, 7, 16), np.float32)
    x[0] = 2
    for axis in (-1, 1):
        layer = BatchNormalization(axis=axis)
        layer(x, training=True)
        layer.backward(x)
        layer(x)
    ended = time.perf_counter()
    return {"import": imported - start, "first calls": ended - imported, "seconds": ended - start}


def _in_fresh_process() -> dict[str, float]:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.starting"],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=300,
    )
    figures: dict[str, float] = json.loads(ended.stdout)
    return figures


def measure(processes: int) -> dict[str, float]:
    """All figures."""
    _in_fresh_process()  # fills the page cache
    every = [_in_fresh_process() for _ in range(processes)]
    return {f"starting/{what}": sorted(figures[what] for figures in every)[processes // 4] for what in every[0]}


if __name__ == "__main__":
    print(json.dumps(this_process()))
