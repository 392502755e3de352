"""Compiles the kernels before they are needed: at installation, or before a service listens.

    python -m bnlayer.kernels.warm

compiles all of them for this machine, once; the machine code is kept beside the source, or in the user's cache folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import product

import numpy as np

from bnlayer.gradients import GradientSums
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import kernels
from bnlayer.layer import BatchNormalization
from bnlayer.moments import Moments
from bnlayer.moving import Moving, Rule, update


def owner() -> None:
    """What the owner of moving statistics computes with, for float32 layers."""
    one = np.ones(1, np.float32)
    grid, backward = Grid.unknown("float32", 1), BackwardGrid.unknown("float32", 1)
    computed, _ = Moments(np.zeros((Moments.rows(1), 1), np.int64), grid).check_window(1e-3, masked=False)
    statistics = computed()
    update(Moving(one, one), statistics, Rule(0.99, 1e-3))
    GradientSums(np.zeros((GradientSums.rows(1), 1), np.int64), backward).check_window(statistics)


def everything(report: Callable[[str], None]) -> None:
    """What any layer computes with.

    Args:
        report: called with what is compiled next.
    """
    layouts = {"channels last": ((8, 8), -1), "channels first": ((2, 8, 3), 1)}
    for dtype, (layout, (shape, axis)), masked in product(("float32", "float64"), layouts.items(), (False, True)):
        report(f"{dtype}, {layout}, {'masked' if masked else 'unmasked'}")
        x = np.ones(shape, dtype)
        layer = BatchNormalization(axis=axis, dtype=dtype)
        layer(x, training=True, mask=np.ones(shape[:-1], bool) if masked else None)
        layer.backward(x)
        layer(x)


def main() -> int:
    """Compile everything, and say how far it is."""
    chosen = kernels()
    start = time.monotonic()
    everything(lambda what: print(f"kernels: {chosen.name}: {what}", flush=True))  # noqa: T201 - a command says what it does
    print(f"kernels: ready after {time.monotonic() - start:.1f} s")  # noqa: T201 - a command says what it does
    return 0


if __name__ == "__main__":
    sys.exit(main())
