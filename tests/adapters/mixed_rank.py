"""One rank of a job whose ranks are of different frameworks: two parallel layers, and one that is used twice.

    bnlayer launch -n 4 -- python mixed_rank.py FOLDER numpy torch jax keras

The rank's place in the list is its framework. It writes what it saw as FOLDER/RANK.npz.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import bnworker
from bnlayer import BatchNormalization

SIZES = {1: (12,), 4: (4, 0, 5, 3)}
STEPS, CHANNELS, MOMENTUM = 6, 3, 0.9
NAMES = ("one", "two", "twice")

Arrays = list[np.ndarray]
Step = Callable[[np.ndarray, np.ndarray], Arrays]  # x and dy; returns y, dx, and the moving statistics of the layers


def with_numpy() -> Step:
    """The layer itself."""
    one, two, twice = layers = [BatchNormalization(synchronized=True, name=name, momentum=MOMENTUM) for name in NAMES]

    def step(x: np.ndarray, dy: np.ndarray) -> Arrays:
        first, pull_one = one.vjp(x, training=True)
        second, pull_two = two.vjp(x, training=True)
        middle, pull_middle = twice.vjp(first + second, training=True)
        y, pull = twice.vjp(middle, training=True)
        dmiddle = pull_middle(pull(dy)[0])[0]
        dx = pull_two(dmiddle)[0]
        dx = dx + pull_one(dmiddle)[0]
        return [y, dx, *(vector for layer in layers for vector in layer.state.moving.values)]

    return step


def with_torch() -> Step:
    """Torch's module, with Keras's convention for the moving variance."""
    import torch

    from bnlayer.adapters.torch import SyncBatchNorm

    one, two, twice = layers = [
        SyncBatchNorm(CHANNELS, eps=1e-3, momentum=1 - MOMENTUM, name=name, unbiased=False) for name in NAMES
    ]

    def step(x: np.ndarray, dy: np.ndarray) -> Arrays:
        inputs = torch.tensor(x, requires_grad=True)
        y = twice(twice(one(inputs) + two(inputs)))
        y.backward(torch.tensor(dy))
        statistics = [vector.numpy().copy() for layer in layers for vector in (layer.running_mean, layer.running_var)]
        return [y.detach().numpy(), inputs.grad.numpy(), *statistics]

    return step


def with_jax() -> Step:
    """The function, compiled with its gradient."""
    import jax
    import jax.numpy as jnp

    from bnlayer.adapters.jax import sync_batch_norm

    zeros, ones = jnp.zeros(CHANNELS), jnp.ones(CHANNELS)
    moving: dict[str, Any] = dict.fromkeys(NAMES, (zeros, ones))

    def network(x: Any, moving: Any) -> Any:
        moving = dict(moving)

        def layer(name: str, x: Any) -> Any:
            y, *moving[name] = sync_batch_norm(x, ones, zeros, *moving[name], momentum=MOMENTUM, name=name)
            return y

        return layer("twice", layer("twice", layer("one", x) + layer("two", x))), moving

    @jax.jit
    def compiled(x: Any, dy: Any, moving: Any) -> Any:
        y, pull, moving = jax.vjp(lambda x: network(x, moving), x, has_aux=True)
        return y, pull(dy)[0], moving

    def step(x: np.ndarray, dy: np.ndarray) -> Arrays:
        nonlocal moving
        y, dx, moving = compiled(x, dy, moving)
        return [np.asarray(array) for array in (y, dx, *(vector for name in NAMES for vector in moving[name]))]

    return step


def with_keras() -> Step:
    """Keras's layer in a `tf.function`: the other two backends are above."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import tensorflow as tf

    from bnlayer.adapters import keras

    one, two, twice = layers = [
        keras.BatchNormalization(synchronized=True, name=name, momentum=MOMENTUM) for name in NAMES
    ]
    for layer in layers:
        layer.build((None, CHANNELS))

    @tf.function(reduce_retracing=True)
    def compiled(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = twice(twice(one(x, training=True) + two(x, training=True), training=True), training=True)
        return y, tape.gradient(y, x, output_gradients=dy)

    def step(x: np.ndarray, dy: np.ndarray) -> Arrays:
        y, dx = compiled(tf.constant(x), tf.constant(dy))
        statistics = [variable.numpy() for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]
        return [y.numpy(), dx.numpy(), *statistics]

    return step


def main(folder: Path, frameworks: list[str]) -> None:
    """Make the steps on this rank's rows."""
    with bnworker.join(timeout=200) as world:
        steps = {"numpy": with_numpy, "torch": with_torch, "jax": with_jax, "keras": with_keras}
        step = steps[frameworks[world.rank]]()
        sizes = SIZES[world.world_size]
        start = sum(sizes[: world.rank])
        mine = slice(start, start + sizes[world.rank])
        seen: dict[str, np.ndarray] = {}
        for number in range(STEPS):
            rng = np.random.default_rng(number)
            x, dy = (rng.standard_cauchy((sum(sizes), CHANNELS)).astype(np.float32) for _ in range(2))
            names = ("y", "dx", *(f"{name} {what}" for name in NAMES for what in ("mean", "variance")))
            seen |= {f"{name} {number}": a for name, a in zip(names, step(x[mine], dy[mine]), strict=True)}
    np.savez(folder / f"{world.rank}.npz", **seen)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
