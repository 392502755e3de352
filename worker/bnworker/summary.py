"""What a training run leaves in files: `--summary` (JSON) and `--save` (safetensors)."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from bnworker.statistics import Statistics
from bnworker.training import Outcome, Replica, Settings
from bnworker.world import World


def summary(outcome: Outcome, world: World, replica: Replica, settings: Settings, data: str) -> dict[str, Any]:
    """The contents of `--summary`.

    Returns:
        test_accuracy, train_loss (mean cross-entropy over the last epoch's training rows), epochs, steps,
        world_size, transport ("service", "mpi" or "alone"), seconds (of training steps alone), moving_version
        (completed forward exchanges of each layer), layers (name, channels, moving_mean, moving_variance,
        moving_version); and, of this rank: rows_per_second, exchanges (by layer, direction and operation),
        bytes_sent, bytes_received, waiting_seconds, replicas, data, settings.
    """
    last, statistics = outcome.epochs[-1], world.statistics
    layers = [
        {
            "name": norm.name,
            "channels": norm.state.channels,
            "moving_mean": norm.state.moving.mean.tolist(),
            "moving_variance": norm.state.moving.variance.tolist(),
            "moving_version": norm.state.version,
        }
        for norm in outcome.model.norms
    ]
    return {
        "test_accuracy": last.test_accuracy,
        "train_loss": last.loss,
        "epochs": len(outcome.epochs),
        "steps": outcome.steps,
        "world_size": world.world_size,
        "transport": world.transport,
        "seconds": outcome.seconds,
        "moving_version": min((norm.state.version for norm in outcome.model.norms), default=0),
        "layers": layers,
        "rows_per_second": sum(epoch.rows for epoch in outcome.epochs) / outcome.seconds,
        "exchanges": exchanges(statistics),
        "bytes_sent": statistics.bytes_sent,
        "bytes_received": statistics.bytes_received,
        "waiting_seconds": statistics.waiting_seconds,
        "replicas": replica.count,
        "data": data,
        "settings": asdict(settings),
    }


def exchanges(statistics: Statistics) -> dict[str, int]:
    """Completed exchanges, e.g. {"bn_1 forward sums": 500, "bn_1 forward probe": 1, "allreduce": 520}."""
    named = {" ".join(part for part in kind if part is not None): count for kind, count in statistics.exchanges.items()}
    return dict(sorted(named.items()))


def summary_file(contents: dict[str, Any]) -> bytes:
    """The summary as a file: JSON, with an end of line."""
    return (json.dumps(contents, indent=2, allow_nan=False) + "\n").encode()


def saved_file(outcome: Outcome, settings: Settings, data: str) -> bytes:
    """The final state as a safetensors file.

    Tensors: "dense_1/kernel", "bn_1/gamma", …: the weights; "bn_1/state/moving_mean", …: each layer's state
    with its grids; "optimizer/dense_1/kernel", …: the velocities. Metadata: data, steps and settings as JSON.
    """
    from safetensors.numpy import save

    named = outcome.model.named_weights()
    tensors = {name: weight.value for name, weight in named.items()}
    velocity = dict(zip(map(id, outcome.optimizer.weights), outcome.optimizer.velocities, strict=True))
    tensors |= {f"optimizer/{name}": velocity[id(weight)] for name, weight in named.items()}
    for norm in outcome.model.norms:
        tensors |= {f"{norm.name}/state/{name}": array for name, array in norm.state.arrays().items()}
    metadata = {"data": data, "steps": str(outcome.steps), "settings": json.dumps(asdict(settings))}
    return save(tensors, metadata)
