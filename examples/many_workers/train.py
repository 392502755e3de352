"""One worker of the experiment: small batches of unlike data, with or without synchronized statistics.

    bnlayer launch -n 8 -- python train.py synchronized --result out.json

Worker k of 8 holds the k-th part of the digits SORTED BY CLASS: one to three classes. A step takes 4 rows of every
worker. In a world of one, the process takes the rows of all workers as one batch: the same steps. With --alike each
worker's rows are of all classes.

Shape suffixes: B rows, D features, H hidden units, K classes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

import bnworker
from bnlayer import BatchNormalization

ROWS = 4  # of a worker in a step
HIDDEN, LEARNING_RATE, MOMENTUM, SEED = 64, 0.05, 0.9, 0

Array = NDArray[Any]


class Network:
    """(Dense, batch normalization, ReLU) twice, then Dense; float64."""

    def __init__(self, synchronized: bool) -> None:
        random = np.random.default_rng(SEED)
        sizes = [(64, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 10)]
        self.kernels = [random.standard_normal(size) * np.sqrt(2.0 / size[0]) for size in sizes]
        self.norms = [
            BatchNormalization(synchronized=synchronized, momentum=MOMENTUM, dtype="float64", name=f"bn_{number}")
            for number in (1, 2)
        ]
        self.inputs: list[Array] = []

    def __call__(self, x_BD: Array, training: bool = False) -> Array:
        """The logits, (B, K)."""
        self.inputs = [x_BD]
        for kernel, norm in zip(self.kernels[:2], self.norms, strict=True):
            self.inputs.append(np.maximum(norm(self.inputs[-1] @ kernel, training=training), 0.0))
        logits_BK: Array = self.inputs[-1] @ self.kernels[2]
        return logits_BK

    def backward(self, gradient_BK: Array) -> list[Array]:
        """The kernels' gradients, of this worker's rows; those of the norms are set."""
        last_HK = self.inputs[2].T @ gradient_BK
        passed_BH = self.norms[1].backward((gradient_BK @ self.kernels[2].T) * (self.inputs[2] > 0))
        middle_HH = self.inputs[1].T @ passed_BH
        passed_BH = self.norms[0].backward((passed_BH @ self.kernels[1].T) * (self.inputs[1] > 0))
        first_DH = self.inputs[0].T @ passed_BH
        return [first_DH, middle_HH, last_HK]

    @property
    def moving(self) -> list[Any]:
        """The moving means and variances."""
        return [variable for norm in self.norms for variable in norm.non_trainable_weights]


def step(network: Network, x_BD: Array, y_B: Array, rows: int, world: bnworker.World, synchronized: bool) -> None:
    """One step on this worker's part of the rows; the gradients of all are added, synchronized or not."""
    logits_BK = network(x_BD, training=True)
    gradient_BK = np.exp(logits_BK - logits_BK.max(axis=1, keepdims=True))
    gradient_BK /= gradient_BK.sum(axis=1, keepdims=True)
    gradient_BK[np.arange(len(y_B)), y_B] -= 1.0
    kernels = network.backward(gradient_BK / rows)
    weights = [variable for norm in network.norms for variable in norm.trainable_weights]
    norms = [np.asarray(variable.gradient) for variable in weights]
    if synchronized:  # gamma's and beta's gradients are those of all workers already
        kernels = world.allreduce(kernels)
    else:
        *kernels, norms[0], norms[1], norms[2], norms[3] = world.allreduce([*kernels, *norms])
    pairs = zip(network.kernels, kernels, strict=True)
    network.kernels = [kernel - LEARNING_RATE * gradient for kernel, gradient in pairs]
    for variable, gradient in zip(weights, norms, strict=True):
        variable.assign(variable.value - LEARNING_RATE * gradient)


def accuracy(network: Network, x_BD: Array, y_B: Array) -> float:
    """Over rows, with the moving statistics that the network holds."""
    return float((network(x_BD).argmax(axis=1) == y_B).mean())


def averaged_accuracy(network: Network, x_BD: Array, y_B: Array, world: bnworker.World) -> float:
    """With the mean of all workers' moving statistics: the best that unsynchronized workers can offer."""
    own = [variable.value.copy() for variable in network.moving]
    for variable, total in zip(network.moving, world.allreduce(own), strict=True):
        variable.assign(total / world.world_size)
    result = accuracy(network, x_BD, y_B)
    for variable, value in zip(network.moving, own, strict=True):
        variable.assign(value)
    return result


def main(synchronized: bool, alike: bool, workers: int, epochs: int, result: Path) -> None:
    """Train; the first worker writes the accuracies after every epoch."""
    x, y = load_digits(return_X_y=True)
    x = x / 16.0
    test = np.arange(len(y)) % 5 == 0
    order = np.random.default_rng(SEED).permutation((~test).sum()) if alike else np.argsort(y[~test], kind="stable")
    shards = np.array_split(np.flatnonzero(~test)[order], workers)
    steps = min(map(len, shards)) // ROWS
    own, averaged = [], []
    with bnworker.join() as world:
        mine = range(workers) if world.world_size == 1 else [world.rank]
        network = Network(synchronized)
        for epoch in range(epochs):
            drawn = {k: np.random.default_rng([SEED, epoch, k]).permutation(shards[k]) for k in mine}
            for number in range(steps):
                rows = np.concatenate([drawn[k][number * ROWS : (number + 1) * ROWS] for k in mine])
                step(network, x[rows], y[rows], workers * ROWS, world, synchronized)
            own.append(accuracy(network, x[test], y[test]))
            averaged.append(averaged_accuracy(network, x[test], y[test], world))
        if world.rank == 0:
            moving = [variable.value.tolist() for variable in network.moving]
            result.write_text(json.dumps({"own": own, "averaged": averaged, "moving": moving}), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("statistics", choices=["synchronized", "plain"])
    parser.add_argument("--alike", action="store_true", help="every worker holds rows of all classes")
    parser.add_argument("--workers", type=int, default=8, help="among whom the rows are divided")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--result", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args()
    main(options.statistics == "synchronized", options.alike, options.workers, options.epochs, options.result)
