"""One rank of a torch program whose ranks may be on several hosts; alone, it has all rows."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import bnworker
from bnlayer.adapters.torch import SyncBatchNorm

STEPS, ROWS, CHANNELS = 20, 48, 33


def train(world: bnworker.World, name: str, folder: Path) -> None:
    """Some steps, forward and backward; this rank's last rows and the layer's statistics go to a file."""
    layer = SyncBatchNorm(CHANNELS, name=name)
    x = y = torch.empty(0)
    for step in range(STEPS):
        rows = np.random.default_rng(step).normal(3, 2, (ROWS, CHANNELS)).astype(np.float32)
        x = torch.from_numpy(rows[world.shard(ROWS)]).requires_grad_()
        y = layer(x)
        (y * x).sum().backward()
    assert x.grad is not None
    arrays = {"y": y.detach(), "dx": x.grad, "mean": layer.running_mean, "variance": layer.running_var}
    np.savez(
        folder / f"{name}-{world.world_size}-{world.rank}.npz", **{key: each.numpy() for key, each in arrays.items()}
    )
    sys.stdout.write(
        f"{name}: rank {world.rank} of {world.world_size} over {world.transport}\n"
    )  # as one: all share it
    sys.stdout.flush()


def main(folder: Path) -> None:
    """Over a service that rank 0 starts, and over torch's own process group."""
    torch.set_num_threads(1)
    with bnworker.join() as world:
        train(world, "service", folder)
        alone = world.world_size == 1
    if not alone:
        dist.init_process_group("gloo")
        with bnworker.join() as world:
            train(world, "torch", folder)
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
