"""The most memory that a training call and a backward take beyond what was there before, over their result's bytes.

    python -m benchmarks.memory 32 56 56 64 [--axis -1] [--masked] [--dtype float32]

Two witnesses, and the larger one counts: `tracemalloc`, to which NumPy reports its arrays, and the resident set of
the process, which holds what compiled kernels allocate as well. Large arrays are mapped one by one here, so that a
freed one leaves the resident set. Grids are known and everything is compiled before anything is counted.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer import BatchNormalization

_M_MMAP_THRESHOLD = -3  # of mallopt(3)


def resident(field: str) -> int:
    """Bytes of VmRSS, or of VmHWM, its greatest so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_ratio(run: Callable[[], NDArray[Any]]) -> float:
    """The extra bytes at the worst moment of `run`, over those of its result."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again at VmRSS
    before = resident("VmRSS")
    tracemalloc.start()
    allocated = tracemalloc.get_traced_memory()[0]
    result = run()
    reported = tracemalloc.get_traced_memory()[1] - allocated
    tracemalloc.stop()
    grown = resident("VmHWM") - before
    return max(grown, reported) / result.nbytes


def main() -> None:
    """Print the two ratios as JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--axis", type=int, default=-1)
    parser.add_argument("--masked", action="store_true")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(given.sizes).astype(given.dtype)
    dy = rng.standard_normal(given.sizes).astype(given.dtype)
    mask = rng.random(given.sizes[:-1]) < 0.9 if given.masked else None
    layer = BatchNormalization(axis=given.axis, dtype=given.dtype)
    for _ in range(2):
        layer(x, training=True, mask=mask)
        layer.backward(dy)
    ratios = {
        "call ÷ output": peak_ratio(lambda: layer(x, training=True, mask=mask)),
        "backward ÷ dx": peak_ratio(lambda: layer.backward(dy)),
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
