"""The same network under Ray Train: two workers on two nodes of a local cluster, synchronized over gloo.

    pip install "ray[train]"
    python examples/ray_train/train.py

Ray's cluster utility starts both nodes on this machine; with a cluster of your own, leave it out. Ray Train initializes
torch.distributed for its workers, so the layers find each other as under torchrun: one line is changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

NETWORK = Path(__file__).resolve().parents[1] / "torch_ddp"


def worker(config: dict[str, Any]) -> None:
    """One rank, in a process of its own, which knows this script but not its neighbours."""
    sys.path.insert(0, config["network"])
    import numpy as np
    import torch
    import torch.distributed as dist
    from resnet import ResNet18
    from sklearn.datasets import load_digits

    import bnlayer.adapters.torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = load_digits(return_X_y=True)
    images = torch.from_numpy((images / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(labels)
    model = ResNet18(width=4)
    model = bnlayer.adapters.torch.convert_sync_batchnorm(model)  # the line that was changed
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(config["epochs"]):
        order = torch.randperm(1500, generator=torch.Generator().manual_seed(epoch))[rank::ranks]
        for rows in order.split(16):
            loss = torch.nn.functional.cross_entropy(ddp(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ddp.eval()
    with torch.no_grad():
        accuracy = (ddp(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()
    nodes: list[Any] = [None] * ranks
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    if rank == 0:
        print(f"{ranks} workers on {len(set(nodes))} nodes: test accuracy {accuracy:.3f}", flush=True)
    ray.train.report({"accuracy": accuracy})


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--epochs", type=int, default=3)
    options = arguments.parse_args()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"epochs": options.epochs, "network": str(NETWORK)},
        scaling_config=ScalingConfig(num_workers=2, placement_strategy="STRICT_SPREAD"),
        torch_config=TorchConfig(backend="gloo"),
    )
    trainer.fit()
    ray.shutdown()
    cluster.shutdown()
