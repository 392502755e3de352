"""A step of ten layers, forward and backward, over (32, 28, 28, 64) per process: alone and as two ranks.

    python -m benchmarks.steps RESULT.json STEPS        as one of the ranks

Figures, on rank 0, in seconds, the first quartile over steps: step/alone, step/mpi, step/service; the median:
step/…, p50. And TensorFlow's, where an interpreter has it, over them: step/tensorflow ÷ mpi, step/tensorflow ÷ service.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from benchmarks.processes import alone, over_service, under_mpi, write

LAYERS = 10
SHAPE = (32, 28, 28, 64)
_WARM = 5


def measure(steps: int) -> dict[str, float]:
    """Alone, over MPI where mpi4py is installed, and over the service."""
    import importlib.util

    module = "benchmarks.steps"
    figures = _named("alone", alone(module, str(steps)))
    if importlib.util.find_spec("mpi4py") is not None:
        figures |= _named("mpi", under_mpi(2, module, str(steps)))
    return figures | _named("service", over_service(2, module, str(steps)))


def _named(name: str, seconds: dict[str, float]) -> dict[str, float]:
    return {f"step/{name}": seconds["quartile"], f"step/{name}, p50": seconds["median"]}


def rank(result: str, steps: int) -> None:
    """Train for some steps as one of the ranks, or alone; rank 0 writes."""
    import bnworker
    from bnlayer import BatchNormalization

    with bnworker.join() as world:
        rng = np.random.default_rng(world.rank)
        x, dy = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
        layers = [BatchNormalization(synchronized=True, name=f"bn{number}") for number in range(LAYERS)]
        seconds = []
        for _ in range(_WARM + steps):
            start = time.perf_counter()
            y, g = x, dy
            for layer in layers:
                y = layer(y, training=True)
            for layer in reversed(layers):
                g = layer.backward(g)
            seconds.append(time.perf_counter() - start)
        if world.rank == 0:
            write(result, summary(seconds[_WARM:]))


def summary(seconds: list[float]) -> dict[str, float]:
    """The first quartile and the median."""
    return {"quartile": float(np.quantile(seconds, 0.25)), "median": float(np.median(seconds))}


if __name__ == "__main__":
    rank(sys.argv[1], int(sys.argv[2]))
