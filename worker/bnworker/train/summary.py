"""The summary of a training run: the file of `--summary`."""

from __future__ import annotations

import json
from typing import Any

from bnworker.statistics import Statistics
from bnworker.train.loop import Outcome, Replica
from bnworker.train.settings import Settings
from bnworker.world import World


def summary(outcome: Outcome, world: World, replica: Replica, settings: Settings, data: str) -> dict[str, Any]:
    """The contents of `--summary`.

    Returns:
        test_accuracy, test_loss (of the resulting model), train_loss (mean cross-entropy over the last epoch's
        training rows), epochs, steps, kept_epoch (the epoch that the model is of), resumed_steps (made by an earlier
        process), world_size, transport ("service", "mpi" or "alone"), seconds (duration of this process's training
        steps), labels (output k of the model stands for the k-th), moving_version (training steps that the moving
        statistics contain; a step that was lost with a rank and repeated counts once), layers (name, channels,
        moving_mean, moving_variance, moving_version), history (per epoch: loss, accuracy, test_loss, …),
        rows_per_second (of all ranks), replicas, data, settings; and of this rank: exchanges (by layer, direction and
        operation), bytes_sent, bytes_received, waiting_seconds.
    """
    last, statistics = outcome.epochs[-1], world.statistics
    layers = [
        {
            "name": norm.name,
            "channels": norm.state.channels,
            "moving_mean": norm.state.moving.mean.tolist(),
            "moving_variance": norm.state.moving.variance.tolist(),
            "moving_version": outcome.updates[norm.name],
        }
        for norm in outcome.model.norms
    ]
    return {
        "test_accuracy": outcome.test_accuracy,
        "test_loss": outcome.test_loss,
        "train_loss": last.loss,
        "epochs": len(outcome.epochs),
        "steps": outcome.steps,
        "kept_epoch": outcome.kept,
        "resumed_steps": outcome.resumed_steps,
        "world_size": world.world_size,
        "transport": world.transport,
        "seconds": outcome.seconds,
        "labels": list(outcome.labels),
        "moving_version": min(outcome.updates.values(), default=0),
        "layers": layers,
        "history": [epoch.record() for epoch in outcome.epochs],
        "rows_per_second": outcome.rows / outcome.seconds if outcome.seconds else 0.0,
        "exchanges": exchanges(statistics),
        "bytes_sent": statistics.bytes_sent,
        "bytes_received": statistics.bytes_received,
        "waiting_seconds": statistics.waiting_seconds,
        "replicas": replica.count,
        "data": data,
        "settings": settings.as_json(),
    }


def exchanges(statistics: Statistics) -> dict[str, int]:
    """Completed exchanges, e.g. {"bn_1 forward sums": 500, "bn_1 forward probe": 1, "allreduce": 520}."""
    named = {" ".join(part for part in kind if part is not None): count for kind, count in statistics.exchanges.items()}
    return dict(sorted(named.items()))


def summary_file(contents: dict[str, Any]) -> bytes:
    """The contents of the file: JSON, with a newline at the end."""
    return (json.dumps(contents, indent=2, allow_nan=False) + "\n").encode()
