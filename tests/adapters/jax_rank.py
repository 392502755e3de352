"""One rank of the tests of the JAX adapter; writes what it saw.

    bnlayer launch -n N -- python jax_rank.py FOLDER PART...

What a part returns is saved as FOLDER/PART-N-RANK.npz.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bnworker
from bnlayer.adapters.jax import allreduce, sync_batch_norm
from support.adapters import shard

jax.config.update("jax_enable_x64", True)  # for the float64 half of `trained`

ROWS, STEPS, MOMENTUM, EPSILON = 12, 20, 0.9, 1e-3
Results = dict[str, Any]


def synchronized(x: Any, weights: Any, moving: Any, name: str) -> tuple[Any, Any]:
    """The function under test."""
    y, *moved = sync_batch_norm(x, *weights, *moving, momentum=MOMENTUM, epsilon=EPSILON, name=name)
    return y, tuple(moved)


def textbook(x: Any, weights: Any, moving: Any, name: str) -> tuple[Any, Any]:
    """The formula, which JAX differentiates itself."""
    mean, variance = x.mean(0), x.var(0)
    moved = tuple(old * MOMENTUM + new * (1 - MOMENTUM) for old, new in zip(moving, (mean, variance), strict=True))
    return weights[0] * (x - mean) / jnp.sqrt(variance + EPSILON) + weights[1], moved


def trained(world: Any, normalization: Any = synchronized) -> Results:
    """Twenty steps of a network with two parallel branches and one layer used twice, on this rank's rows."""
    results: Results = {}
    for dtype in ("float32", "float64"):
        rng = np.random.default_rng(0)
        weights: Any = {
            name: rng.standard_normal(shape).astype(dtype) for name, shape in (("in", (6, 5)), ("out", (5, 2)))
        }
        weights |= {name: (np.ones(5, dtype), np.zeros(5, dtype)) for name in ("one", "two", "twice")}
        moving: Any = {name: (np.zeros(5, dtype), np.ones(5, dtype)) for name in ("one", "two", "twice")}
        step = compiled(normalization, dtype)
        for number in range(STEPS):
            x = np.random.default_rng([1, number]).standard_normal((ROWS, 6)).astype(dtype)
            mine = x[shard(world.rank, world.world_size)]
            y, dx, weights, moving = step(weights, moving, mine, np.tanh(mine[:, :2]))
            results |= {f"{dtype}_y": np.asarray(y), f"{dtype}_dx": np.asarray(dx)}
        for number, leaf in enumerate(jax.tree.leaves((weights, moving))):
            results[f"{dtype}_leaf{number:02}"] = np.asarray(leaf)
    return results


def compiled(normalization: Any, dtype: str) -> Any:
    """A training step, reduction and update included, as one program."""

    def loss(weights: Any, x: Any, moving: Any, target: Any) -> Any:
        moving = dict(moving)

        def layer(name: str, x: Any) -> Any:
            y, moving[name] = normalization(x, weights[name], moving[name], f"{dtype}_{name}")
            return y

        h = x @ weights["in"]
        branches = layer("one", h) + layer("two", jnp.sin(h))
        y = layer("twice", jnp.tanh(layer("twice", branches))) @ weights["out"]
        return ((y - target) ** 2).sum() / ROWS, (y, moving)

    @jax.jit
    def step(weights: Any, moving: Any, x: Any, target: Any) -> Any:
        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (gradients, dx), (y, moving) = gradient(weights, x, moving, target)
        gradients = allreduce(gradients, op="sum")
        return y, dx, jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients), moving

    return step


def plain(world: Any) -> Results:
    """The same by one process with all rows and the textbook's formula."""
    return trained(world, textbook)


def bits(world: Any) -> Results:
    """The function alone, masked too and of every dtype: y, dx and moving statistics of every step."""
    results: Results = {}
    mine = shard(world.rank, world.world_size)
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        wide = "float64" if dtype == "float64" else "float32"
        moving: Any = (jnp.zeros(3, wide), jnp.ones(3, wide))
        weights = (jnp.full(3, 1.5, wide), jnp.full(3, -0.5, wide))

        @jax.jit
        def step(x: Any, mask: Any, dy: Any, moving: Any, dtype: str = dtype, weights: Any = weights) -> Any:
            def network(x: Any) -> Any:
                y, *moved = sync_batch_norm(x, *weights, *moving, mask=mask, axis=1, name=f"bits_{dtype}")
                z, *moved = sync_batch_norm(y, *weights, *moved, axis=1, mask=mask, name=f"bits_{dtype}")
                return z, moved

            z, pull, moved = jax.vjp(network, x, has_aux=True)
            return z, pull(dy)[0], moved

        for number in range(STEPS):
            rng = np.random.default_rng([2, number])
            x, dy = (jnp.asarray(rng.standard_normal((ROWS, 3, 4)) * 10.0 ** (number % 5), dtype) for _ in range(2))
            mask = rng.random((ROWS, 3)) < 0.7
            y, dx, moving = step(x[mine], mask[mine], dy[mine], moving)
            results |= {
                f"{dtype}_y{number}": y,
                f"{dtype}_dx{number}": dx,
                f"{dtype}_moving{number}": jnp.stack(moving),
            }
    return {name: np.asarray(array.astype(jnp.float64)) for name, array in results.items()}


def failing(world: Any, what: str) -> Results:
    """A compiled step whose last rank raises, or skips a layer: what the others are told."""
    last = world.rank == world.world_size - 1
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)

    @jax.jit
    def step(x: Any) -> Any:
        def network(x: Any) -> Any:
            y = sync_batch_norm(x, ones, zeros, zeros, ones, name=f"{what}_one")[0]
            if not (last and what == "skips"):
                y = sync_batch_norm(y, ones, zeros, zeros, ones, name=f"{what}_two")[0]
            return y.sum()

        return jax.grad(network)(x)

    rows = np.ones((4, 3), np.float32)
    jax.block_until_ready(step(rows))
    world.barrier()
    if last and what == "raises":
        raise ValueError("a fault of its own")
    start = time.perf_counter()
    try:
        jax.block_until_ready(step(rows))
    finally:
        print(f"rank {world.rank}: {what} {time.perf_counter() - start:.3f} s", flush=True)
    return {}


PARTS = {"trained": trained, "plain": plain, "bits": bits}


def main(folder: Path, parts: list[str]) -> None:
    """Run the parts one after the other, each in a world of its own; of those that fail, save the text."""
    rank, world_size, job = (os.environ[f"BNLAYER_{name}"] for name in ("RANK", "WORLD_SIZE", "JOB"))
    for part in parts:
        try:
            with bnworker.join(job=f"{job}-{part}", timeout=120) as world:
                results = PARTS[part](world) if part in PARTS else failing(world, part)
        except Exception as error:
            if part in PARTS:
                raise
            results = {"text": np.array(f"{type(error).__name__}: {error}")}
        np.savez(folder / f"{part}-{world_size}-{rank}.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
