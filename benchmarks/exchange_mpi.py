"""An exchange of a layer over MPI, beside a bare Iallreduce of the same bytes.

    mpiexec -n 2 python -m benchmarks.exchange_mpi RESULT.json ROUNDS

An exchange is what a layer calls: it compares key and signature with the other ranks', and sums the limbs.
Bare is one Iallreduce of the same limbs on a communicator of its own, and a loop of Test. Both take turns in
blocks of 50; the median of each block is taken on rank 0, and the first quartile over blocks. Figures, with R ranks:

    mpi/R ranks/C=…/exchange, mpi/R ranks/C=…/bare, mpi/R ranks/C=…/exchange − bare    seconds
    mpi/R ranks/C=…/exchange, p99                                                      seconds

With more ranks than cores, a bare loop of Test keeps the core from the rank that it waits for; it yields then, as
the transport does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import under_mpi, write

CHANNELS = (64, 256, 1024, 2048)
_ROWS = 6  # int64 limbs per channel
_BLOCK = 50  # exchanges of one kind before the other kind's turn


def measure(ranks: int, repetitions: int) -> dict[str, float]:
    """Start ranks and return what rank 0 found."""
    return under_mpi(ranks, "benchmarks.exchange_mpi", str(repetitions))


def rank(result: str, repetitions: int) -> None:
    """Measure as one of the ranks; rank 0 writes."""
    from mpi4py import MPI

    import bnworker
    from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation

    bare_comm = MPI.COMM_WORLD.Dup()
    crowded = bare_comm.size > len(os.sched_getaffinity(0))
    figures: dict[str, float] = {}
    with bnworker.join(transport="mpi") as world:
        for channels in CHANNELS:
            limbs = np.arange(_ROWS * channels, dtype=np.int64).reshape(_ROWS, channels)
            total = np.empty_like(limbs)
            signature = LayerSignature(channels, "float32", 0.99, 1e-3, grid=1234567890123456789)
            step = 0

            def exchange(
                limbs: NDArray[np.int64] = limbs, channels: int = channels, signature: LayerSignature = signature
            ) -> None:
                nonlocal step
                key = ExchangeKey(f"layer_{channels}", Direction.FORWARD, step)
                step += 1
                world.exchange(Call(Operation.SUMS, key, signature), limbs)

            def bare(limbs: NDArray[np.int64] = limbs, total: NDArray[np.int64] = total) -> None:
                request = bare_comm.Iallreduce(limbs, total, MPI.SUM)
                if crowded:
                    while not request.Test():
                        os.sched_yield()
                else:
                    while not request.Test():
                        pass

            times = _in_turn({"exchange": exchange, "bare": bare}, repetitions, bare_comm.Barrier)
            at = f"mpi/{world.world_size} ranks/C={channels}"
            medians = {
                name: float(np.quantile(np.median(np.reshape(seconds, (-1, _BLOCK)), 1), 0.25))
                for name, seconds in times.items()
            }
            figures |= {f"{at}/{name}": seconds for name, seconds in medians.items()}
            figures[f"{at}/exchange − bare"] = medians["exchange"] - medians["bare"]
            figures[f"{at}/exchange, p99"] = float(np.quantile(times["exchange"], 0.99))
        if world.rank == 0:
            write(result, figures)


def _in_turn(
    kinds: dict[str, Callable[[], None]], repetitions: int, barrier: Callable[[], object]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for run in kinds.values():
        run()
    for _ in range(max(1, repetitions // _BLOCK)):
        for name, run in kinds.items():
            barrier()
            for _ in range(_BLOCK):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    rank(sys.argv[1], int(sys.argv[2]))
