"""An all_reduce of the same bytes over torch's gloo, the peer where there is no NCCL.

    python -m benchmarks.exchange_gloo RESULT.json ROUNDS        RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set

Figures, with R ranks: gloo/R ranks/C=…/all_reduce, and its p99, in seconds; the median on rank 0.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from benchmarks.exchange_mpi import CHANNELS
from benchmarks.processes import free_ports, side_by_side, write

_ROWS = 6


def measure(ranks: int, repetitions: int) -> dict[str, float]:
    """Start ranks and return what rank 0 found."""
    (port,) = free_ports(1)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environments = [{**common, "RANK": str(rank)} for rank in range(ranks)]
    return side_by_side(environments, "benchmarks.exchange_gloo", str(repetitions))


def rank(result: str, repetitions: int) -> None:
    """Measure as one of the ranks; rank 0 writes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    figures = {}
    for channels in CHANNELS:
        limbs = torch.zeros((_ROWS, channels), dtype=torch.int64)
        seconds = []
        for number in range(repetitions + 10):
            start = time.perf_counter()
            dist.all_reduce(limbs)
            if number >= 10:
                seconds.append(time.perf_counter() - start)
        at = f"gloo/{dist.get_world_size()} ranks/C={channels}/all_reduce"
        figures[at], figures[f"{at}, p99"] = (float(np.quantile(seconds, q)) for q in (0.5, 0.99))
    if dist.get_rank() == 0:
        write(result, figures)
    dist.destroy_process_group()


if __name__ == "__main__":
    rank(sys.argv[1], int(sys.argv[2]))
