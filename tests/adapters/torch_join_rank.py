"""One rank under torchrun that joins explicitly: over the process group, and over a service that needs no address."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import bnworker
from bnlayer.adapters.torch import SyncBatchNorm


def main(folder: Path) -> None:
    """Train a step in each world."""
    torch.set_num_threads(1)
    seen: dict[str, object] = {}
    try:
        bnworker.join(transport="torch")
    except ValueError as error:
        seen["too early"] = str(error)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for transport in ("torch", None, "service"):
        with bnworker.join(transport=transport) as world:
            layer = SyncBatchNorm(2, name=f"over {transport}")
            layer(torch.arange(12.0).reshape(6, 2)[world.shard(6)])
            (total,) = world.allreduce([world.rank + 1.0])
            seen[str(transport)] = [world.transport, repr(world), float(total), layer.running_mean.tolist()]
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
