"""One rank of a job that can't go on: what the others are told, and when.

torchrun --nproc-per-node=3 torch_ending_rank.py FOLDER ENDING
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bnlayer import CollectiveError
from bnlayer.adapters.torch import SyncBatchNorm

ODD = 1  # the rank that does something else


def main(folder: Path, ending: str) -> None:
    """Train a step with everyone, then one in which a rank does something else."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, once a rank has failed: what they are told is ours
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    layers = [SyncBatchNorm(3, name=name) for name in ("first", "second")]
    rank, odd = dist.get_rank(), dist.get_rank() == ODD
    record = folder / str(rank)
    _step(layers, skip_forward=False, skip_backward=False)
    if ending == "late":
        time.sleep(0.5 * (rank == 0))  # still computing when the others fail
    try:
        if odd:
            record.write_text(f"{time.monotonic()} odd")
            if ending == "raises":
                raise KeyError("mine")
            if ending == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
        _step(layers, skip_forward=odd and ending == "skips", skip_backward=odd and ending == "skips back")
    except CollectiveError as error:
        record.write_text(f"{time.monotonic()} {type(error).__name__} {error}")
        return
    if not odd:
        record.write_text(f"{time.monotonic()} nothing happened")


def _step(layers: list[Any], *, skip_forward: bool, skip_backward: bool) -> None:
    x = torch.arange(12.0).reshape(4, 3).requires_grad_()
    first = layers[0](x)
    second = first if skip_forward else layers[1](first)
    (first if skip_backward else second).square().sum().backward()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
