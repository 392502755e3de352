"""One rank of the tests of the Keras adapter, on the backend of KERAS_BACKEND; writes what it saw.

    bnlayer launch -n N -- python keras_rank.py FOLDER PART...

What a part returns is saved as FOLDER/PART-N-RANK.npz.
"""

# ruff: noqa: E402 - what a rank does without is said before Keras is imported

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.modules["sklearn"] = None  # type: ignore[assignment]  # Keras imports it for a wrapper: a quarter of a rank's start

import keras
import numpy as np
from keras import layers, ops

import bnworker
from bnlayer.adapters.keras import BatchNormalization, convert, reduce_gradients
from support.adapters import shard

ROWS, STEPS = 12, 20
Results = dict[str, Any]
Step = Callable[[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]], tuple[Any, Any]]
RNG = np.random.default_rng


# ---- one training step, in each backend's own compiled way: y, and the gradient of the first input ----


def compiled(model: Any, loss: Callable[[Any, Any], Any], optimizer: Any = None) -> Step:
    """A step of a model: forward, backward, and the optimizer's update where there is one."""
    if optimizer is not None:
        optimizer.build(model.trainable_variables)
    return {"torch": _torch, "jax": _jax, "tensorflow": _tensorflow}[keras.backend.backend()](model, loss, optimizer)


def _torch(model: Any, loss: Callable[[Any, Any], Any], optimizer: Any) -> Step:
    import torch

    def step(inputs: list[Any], target: Any) -> tuple[Any, Any]:
        first, *rest = (torch.tensor(array) for array in inputs)
        first.requires_grad_(True)
        y = model([first, *rest], training=True)
        model.zero_grad()
        loss(y, torch.tensor(target)).backward()
        if optimizer is not None:
            with torch.no_grad():
                optimizer.apply([v.value.grad for v in model.trainable_variables], model.trainable_variables)
        return y.detach().numpy(), first.grad.numpy()

    return step


def _tensorflow(model: Any, loss: Callable[[Any, Any], Any], optimizer: Any) -> Step:
    import tensorflow as tf

    # Of any number of rows: Keras takes an addend of no rows for a bias, where it sees the number.
    rows = [tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype) for tensor in (*model.inputs, model.outputs[0])]

    @tf.function(input_signature=[rows[:-1], rows[-1]])
    def traced(inputs: list[Any], target: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(inputs[0])
            y = model(inputs, training=True)
            total = loss(y, target)
        dx, gradients = tape.gradient(total, [inputs[0], [v.value for v in model.trainable_variables]])
        if optimizer is not None:
            optimizer.apply(gradients, model.trainable_variables)
        return y, dx

    def step(inputs: list[Any], target: Any) -> tuple[Any, Any]:
        y, dx = traced([tf.constant(array) for array in inputs], tf.constant(target))
        return y.numpy(), dx.numpy()

    return step


def _jax(model: Any, loss: Callable[[Any, Any], Any], optimizer: Any) -> Step:
    import jax

    def objective(weights: Any, first: Any, rest: Any, state: Any, target: Any) -> Any:
        y, state = model.stateless_call(weights, state, [first, *rest], training=True)
        return loss(y, target), (y, state)

    @jax.jit
    def traced(weights: Any, state: Any, slots: Any, first: Any, rest: Any, target: Any) -> Any:
        gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
        (gradients, dx), (y, state) = gradient(weights, first, rest, state, target)
        if optimizer is not None:
            weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return y, dx, weights, state, slots

    def step(inputs: list[Any], target: Any) -> tuple[Any, Any]:
        groups = (
            model.trainable_variables,
            model.non_trainable_variables,
            [] if optimizer is None else optimizer.variables,
        )
        values = [[v.value for v in variables] for variables in groups]
        y, dx, *after = traced(*values, inputs[0], inputs[1:], target)
        for variables, new in zip(groups, after, strict=True):
            for variable, value in zip(variables, new, strict=True):
                variable.assign(value)
        return np.asarray(y), np.asarray(dx)

    return step


# ---- the parts ----


def network(normalization: Any, dtype: str) -> Any:
    """Dense layers, two parallel branches, and one layer used twice."""
    keras.utils.set_random_seed(0)
    arguments = {"momentum": 0.9, "dtype": dtype}
    x = keras.Input((6,), dtype=dtype)
    h = layers.Dense(5, dtype=dtype)(x)
    one = normalization(name=f"{dtype}_one", **arguments)(h)
    two = normalization(name=f"{dtype}_two", **arguments)(ops.sin(h))
    twice = normalization(name=f"{dtype}_twice", **arguments)
    return keras.Model([x], layers.Dense(2, dtype=dtype)(twice(ops.tanh(twice(one + two)))))


def squares(y: Any, target: Any) -> Any:
    """This rank's share of the loss of all rows."""
    return ops.sum((y - target) ** 2) / ROWS


def trained(world: Any, normalization: Any = None) -> Results:
    """Twenty steps of the network on this rank's rows: last output and input gradient, and all weights."""
    results: Results = {}
    mine = shard(world.rank, world.world_size)
    for dtype in ("float32", "float64"):
        build = normalization or (lambda **arguments: BatchNormalization(synchronized=True, **arguments))
        model = network(build, dtype)
        step = compiled(model, squares, reduce_gradients(keras.optimizers.SGD(0.1), op="sum"))
        for number in range(STEPS):
            x = RNG([0, number]).standard_normal((ROWS, 6)).astype(dtype)
            y, dx = step([x[mine]], np.tanh(x[mine, :2]))
            results |= {f"{dtype}_y": y, f"{dtype}_dx": dx}
        results |= {f"{dtype}_weight{number:02}": weight for number, weight in enumerate(model.get_weights())}
    return results


def plain(world: Any) -> Results:
    """The same with Keras's own layers, by one process with all rows."""
    return trained(world, layers.BatchNormalization)


def bits(world: Any) -> Results:
    """The layers alone, masked and with renorm: y, dx and statistics of every step."""
    arguments: dict[str, Any] = {"synchronized": True, "momentum": 0.9}
    x, mask = keras.Input((4, 3)), keras.Input((4,), dtype="bool")
    twice = BatchNormalization(name="twice", **arguments)
    h = BatchNormalization(name="one", **arguments)(x) + BatchNormalization(name="two", **arguments)(x, mask=mask)
    h = BatchNormalization(name="renorm", renorm=True, renorm_clipping={"rmax": 2.0}, **arguments)(h, mask=mask)
    model = keras.Model([x, mask], twice(twice(h)))
    step = compiled(model, lambda y, weights: ops.sum(y * weights))
    mine = shard(world.rank, world.world_size)
    results = {}
    for number in range(STEPS):
        rng = RNG([1, number])
        batch, weights = (rng.standard_normal((ROWS, 4, 3)).astype("float32") * 10**number % 7 for _ in range(2))
        rows = [batch[mine], (rng.random((ROWS, 4)) < 0.7)[mine]]
        results[f"y{number}"], results[f"dx{number}"] = step(rows, weights[mine])
        for variable in model.non_trainable_variables:
            results[f"{variable.path} {number}"] = ops.convert_to_numpy(variable)
    return results


def fitted(world: Any) -> Results:
    """`fit()` of a converted model on equal shards, with a Masking layer's mask; alone, of one with Keras's own."""
    keras.utils.set_random_seed(0)
    x = keras.Input((3, 4))
    h = layers.BatchNormalization(name="fit_one")(layers.Masking()(x))
    h = layers.BatchNormalization(name="fit_two")(layers.Dense(5)(h))
    model = keras.Model(x, layers.Dense(1)(layers.GlobalAveragePooling1D()(h)))
    if world.world_size > 1:
        convert(model)
    model.compile(reduce_gradients(keras.optimizers.SGD(0.05)), "mse")
    data = RNG(2).standard_normal((5, ROWS, 3, 4)).astype("float32")
    data[:, :, 2] *= (RNG(3).random((5, ROWS)) < 0.5)[..., None]  # zeros are masked
    mine = data[:, world.shard(ROWS)].reshape(-1, 3, 4)
    each = len(mine) // 5
    model.fit(mine, mine[:, 0, :1], batch_size=each, epochs=4, shuffle=False, verbose=0)
    return {f"weight{number:02}": weight for number, weight in enumerate(model.get_weights())}


def failing(world: Any, what: str) -> Results:
    """A step whose last rank raises, or skips a layer: what the others are told, and after how long."""
    last = world.rank == world.world_size - 1
    x = keras.Input((3,))
    h = BatchNormalization(synchronized=True, name=f"{what}_one")(x)
    if not (last and what == "skips"):
        h = BatchNormalization(synchronized=True, name=f"{what}_two")(h)
    step = compiled(keras.Model([x], h), lambda y, _: ops.sum(y))
    rows = np.ones((4, 3), np.float32)
    step([rows], rows)  # or, where a layer is skipped, here already
    world.barrier()
    if last and what == "raises":
        raise ValueError("a fault of its own")
    start = time.perf_counter()
    try:
        step([rows], rows)
    finally:
        print(f"rank {world.rank}: {what} {time.perf_counter() - start:.3f} s", flush=True)
    return {}


class Raises(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
    """Fails after the first batch."""

    at = 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Called by `fit()`."""
        Raises.at = time.monotonic()
        raise ValueError("a fault of its own")


def fitting(world: Any, what: str) -> None:
    """`fit()`, in which the last rank's callback raises, or whose model there lacks a layer."""
    last = world.rank == world.world_size - 1
    x = keras.Input((3,))
    h = BatchNormalization(synchronized=True, name=f"{what}_one")(x)
    if not (last and what == "fit_skips"):
        h = BatchNormalization(synchronized=True, name=f"{what}_two")(h)
    model = keras.Model(x, layers.Dense(1)(h))
    model.compile("sgd", "mse")
    rows = RNG(4).standard_normal((12, 3)).astype("float32")
    callbacks = [Raises()] if last and what == "fit_raises" else []
    model.fit(rows, rows[:, :1], batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)


def failure(what: str) -> Results:
    """Run `failing`, or `fitting`, in a world of its own; the text of the error, and when it was raised."""
    text = "no error"
    try:
        with bnworker.join(job=f"{os.environ['BNLAYER_JOB']}-{what}", timeout=120) as world:
            (fitting if what.startswith("fit_") else failing)(world, what)
    except Exception as error:  # noqa: BLE001 - each framework has its own class for it
        text = f"{type(error).__name__}: {error}"
    return {"text": np.array(text), "at": np.array(Raises.at or time.monotonic())}


def main(folder: Path, parts: list[str]) -> None:
    """Run the parts one after the other."""
    for part in parts:
        rank, world_size = os.environ["BNLAYER_RANK"], os.environ["BNLAYER_WORLD_SIZE"]
        np.savez(folder / f"{part}-{world_size}-{rank}.npz", **(_passed if part in PARTS else failure)(part))


def _passed(part: str) -> Results:
    with bnworker.join(job=f"{os.environ['BNLAYER_JOB']}-{part}", timeout=120) as world:
        return PARTS[part](world)


PARTS = {"trained": trained, "plain": plain, "bits": bits, "fitted": fitted}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
