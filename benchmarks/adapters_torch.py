"""The torch adapter beside torch's own: layers on one thread, and exchanges over gloo between two ranks.

    .venv-adapters/bin/python -m benchmarks.adapters_torch

Both sides are called in turn, so that a busy machine is busy for both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from bnlayer.adapters.torch import SyncBatchNorm
from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation

LAYERS = (
    ("(32, 64, 56, 56)", (32, 64, 56, 56), torch.contiguous_format, torch.float32, 1.0),
    ("(32, 64, 56, 56) channels_last", (32, 64, 56, 56), torch.channels_last, torch.float32, 1.1),
    ("(32, 64, 56, 56) bfloat16", (32, 64, 56, 56), torch.contiguous_format, torch.bfloat16, None),
    ("(32, 64)", (32, 64), torch.contiguous_format, torch.float32, 1.5),
)
CHANNELS = (16, 64, 256, 512)


def ratio(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Both times in seconds, and their ratio: medians of calls that alternate."""
    times = []
    for repeat in range(repeats + 5):
        pair = []
        for step in (ours, theirs):
            start = time.perf_counter()
            step()
            pair.append(time.perf_counter() - start)
        if repeat >= 5:  # the first ones find the grid, and what the machine does first
            times.append(pair)
    a, b = (median(side) for side in zip(*times, strict=True))
    return a, b, a / b


def layers() -> None:
    """Forward and backward of one layer in one process."""
    torch.set_num_threads(1)
    print("| forward and backward, one thread | adapter | torch | adapter ÷ torch | bar |\n|---|---|---|---|---|")
    for name, shape, layout, dtype, bar in LAYERS:
        kinds = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}
        ours, theirs = SyncBatchNorm(shape[1]), kinds[len(shape)](shape[1])
        x = torch.randn(shape).to(dtype)
        if layout is not torch.contiguous_format:
            x = x.contiguous(memory_format=layout)
        x.requires_grad_()
        dy = torch.randn_like(x)

        repeats = 25 if len(shape) == 4 else 2000
        a, b, r = ratio(partial(_step, ours, x, dy), partial(_step, theirs, x, dy), repeats)
        print(f"| {name} | {a * 1e3:.3g} ms | {b * 1e3:.3g} ms | {r:.2f} | {'' if bar is None else f'≤ {bar}'} |")


def _step(layer: Any, x: Any, dy: Any) -> None:
    x.grad = None
    layer(x).backward(dy)


def exchanges() -> None:
    """Between the ranks of a process group; rank 0 prints."""
    from bnworker.transports.torch import TorchTransport

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    transport = TorchTransport()
    if dist.get_rank() == 0:
        print("\n| sums of a layer, two gloo ranks | exchange | bare all_reduce | ratio | bar |\n|---|---|---|---|---|")
    for channels in CHANNELS:
        limbs = np.ones((6, channels), np.int64)
        tensor = torch.zeros(limbs.size, dtype=torch.int64)
        signature, steps = LayerSignature(channels, "float32", 0.9, 1e-5), iter(range(10**9))

        def exchange(signature: Any = signature, limbs: Any = limbs, steps: Any = steps) -> None:
            key = ExchangeKey("a layer", Direction.FORWARD, next(steps))
            transport.exchange(Call(Operation.SUMS, key, signature), limbs)

        a, b, r = ratio(exchange, partial(dist.all_reduce, tensor), 1500)
        if dist.get_rank() == 0:
            print(f"| {channels} channels | {a * 1e6:.0f} µs | {b * 1e6:.0f} µs | {r:.2f} | ≤ 2.3 |", flush=True)
    transport.leave("")
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        exchanges()
    else:
        layers()
        sys.stdout.flush()
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", __spec__.name]
        subprocess.run([sys.executable, *torchrun], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
