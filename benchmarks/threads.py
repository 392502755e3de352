"""Two threads beside one, at shapes whose arrays stay in the caches: with larger ones they share the memory's speed.

    python -m benchmarks.threads RESULT.json BUDGET_S        in a process of its own

Figures:

    threads/SHAPE/forward, two vs one, …/backward, …    the time of one thread over that of two
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks.kernels import BACKWARD, FORWARD, SHAPES, Batch, Shape, ours
from benchmarks.processes import write
from benchmarks.timing import keep_memory, timed
from bnlayer.kernels.compiled import Compiled, variants

CACHED = (Shape((32, 7, 7, 128)), Shape((32, 7, 7, 256)), *SHAPES[2:4])


def measure(shape: Shape, budget_s: float) -> dict[str, float]:
    """Both passes of a shape."""
    batch = Batch.of(shape)
    runs: dict[str, Callable[[], object]] = {}
    for threads in (1, 2):
        kernels = Compiled(variants()[0], threads)
        runs |= {f"{which}/{threads}": ours(kernels, "", batch)[which, ""] for which in (FORWARD, BACKWARD)}
    seconds = {name: contender.seconds for name, contender in timed(runs, budget_s).items()}
    return {
        f"threads/{shape}/{which}, two vs one": seconds[f"{which}/1"] / seconds[f"{which}/2"]
        for which in (FORWARD, BACKWARD)
    }


def main(result: str, budget_s: str) -> None:
    """Measure all in this process."""
    keep_memory()
    figures: dict[str, float] = {}
    for shape in CACHED:
        figures |= measure(shape, float(budget_s))
    write(result, figures)


if __name__ == "__main__":
    main(*sys.argv[1:])
