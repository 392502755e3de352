"""A fresh process: the seconds of its import and first calls, with a warm cache and without any.

    python -m benchmarks.starting        in a process of its own; prints JSON

First calls are a training call, its backward and an inference, channels last and first. What the interpreter itself
needs before it runs a line is not counted. Figures:

    starting/warm/import, starting/warm/first calls, starting/warm/seconds    the first quartile over processes
    starting/cold/seconds                                                     once, without machine code; --full
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
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


def _in_fresh_process(environment: dict[str, str]) -> dict[str, float]:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.starting"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        timeout=300,
    )
    found: dict[str, float] = json.loads(ended.stdout)
    return found


def measure(processes: int, *, cold: bool) -> dict[str, float]:
    """All figures; the cold one if asked for."""
    _in_fresh_process({})  # fills the cache
    warm = [_in_fresh_process({}) for _ in range(processes)]
    figures = {}
    for what in warm[0]:
        figures[f"starting/warm/{what}"] = sorted(found[what] for found in warm)[processes // 4]
    if not cold:
        return figures
    with tempfile.TemporaryDirectory() as empty:
        figures["starting/cold/seconds"] = _in_fresh_process({"NUMBA_CACHE_DIR": empty})["seconds"]
    return figures


if __name__ == "__main__":
    print(json.dumps(this_process()))
