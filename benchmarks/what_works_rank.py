"""One rank of `what_works`: a synchronized layer of one framework, on this rank's rows of the cases that are named.

    python -m benchmarks.what_works_rank FOLDER ROW CASE...

A case is three training steps of one layer with float32 data of shape (rows, 4, 3), channels last. What the rank saw
becomes FOLDER/CASE-RANK.npz: y and dx of its rows for each step, and the moving statistics after the last; or
FOLDER/CASE-RANK.error, the line of the error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.what_works_cases import CASES, EPSILON, MOMENTUM, STEPS, Case, data

Array = NDArray[Any]
Step = Callable[[Array, Array, Array | None], tuple[Array, Array]]  # x, dy and a mask in; y and dx out
Layer = tuple[Step, Callable[[], Sequence[Array]]]  # and what gives the moving mean and variance
_SHAPE = (4, 3)


# ---- torch: channels are the second axis there ----


def torch_ours(name: str, device: str = "cpu") -> Layer:
    """The adapter's module."""
    from bnlayer.adapters.torch import SyncBatchNorm

    return _torch(SyncBatchNorm(3, EPSILON, 1 - MOMENTUM, name=name), device)


def torch_theirs(_name: str, device: str = "cpu") -> Layer:
    """torch.nn.SyncBatchNorm."""
    import torch

    return _torch(torch.nn.SyncBatchNorm(3, EPSILON, 1 - MOMENTUM), device)


def torch_passes(name: str) -> Layer:
    """The adapter as it computes on devices other than the CPU, on tensors of the CPU."""
    from bnlayer.adapters import torch_tensors

    def on_host(x: Any) -> bool:
        del x
        return False

    torch_tensors._on_host = on_host  # noqa: SLF001 - what decides it
    return torch_ours(name)


def _torch(layer: Any, device: str) -> Layer:
    import torch

    layer = layer.to(device)

    def step(x: Array, dy: Array, mask: Array | None) -> tuple[Array, Array]:
        inputs, gradient = (torch.tensor(a).movedim(-1, 1).contiguous().to(device) for a in (x, dy))
        inputs.requires_grad_()
        y = layer(inputs) if mask is None else layer(inputs, mask=torch.tensor(mask, device=device))
        y.backward(gradient)
        return tuple(t.detach().movedim(1, -1).cpu().numpy() for t in (y, inputs.grad))

    return step, lambda: [layer.running_mean.cpu().numpy(), layer.running_var.cpu().numpy()]


# ---- Keras: channels last, its own convention ----


def keras_ours(name: str) -> Layer:
    """The adapter's layer."""
    from bnlayer.adapters.keras import BatchNormalization

    return _keras(BatchNormalization(synchronized=True, momentum=MOMENTUM, epsilon=EPSILON, name=name))


def keras_theirs(_name: str) -> Layer:
    """Keras's layer; on TensorFlow under MultiWorkerMirroredStrategy."""
    import keras

    if keras.backend.backend() != "tensorflow":
        return _keras(keras.layers.BatchNormalization(synchronized=True, momentum=MOMENTUM, epsilon=EPSILON))
    import tensorflow as tf

    strategy = _strategy()
    with strategy.scope():
        layer = keras.layers.BatchNormalization(synchronized=True, momentum=MOMENTUM, epsilon=EPSILON)
        layer.build((None, *_SHAPE))

    @tf.function
    def traced(*arrays: Any) -> Any:
        return strategy.run(_tape, (layer, *arrays))

    return _tensorflow(traced, layer)


def _strategy() -> Any:
    """One for all cases: it must be made before anything else of TensorFlow."""
    import tensorflow as tf

    if not _made:
        _made.append(tf.distribute.MultiWorkerMirroredStrategy())
    return _made[0]


_made: list[Any] = []


def _keras(layer: Any) -> Layer:
    import keras

    layer.build((None, *_SHAPE))
    backend = keras.backend.backend()
    if backend == "torch":
        return _keras_on_torch(layer)
    if backend == "jax":
        return _keras_on_jax(layer)
    import tensorflow as tf

    return _tensorflow(tf.function(lambda *arrays: _tape(layer, *arrays)), layer)


def _tape(layer: Any, x: Any, dy: Any, *masks: Any) -> Any:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True, **({"mask": masks[0]} if masks else {}))
    return y, tape.gradient(y, x, output_gradients=dy)


def _tensorflow(traced: Any, layer: Any) -> Layer:
    import tensorflow as tf

    def step(x: Array, dy: Array, mask: Array | None) -> tuple[Array, Array]:
        y, dx = traced(*(tf.constant(a) for a in (x, dy, mask) if a is not None))
        return y.numpy(), dx.numpy()

    return step, lambda: [np.asarray(layer.moving_mean), np.asarray(layer.moving_variance)]


def _keras_on_torch(layer: Any) -> Layer:
    import torch

    def step(x: Array, dy: Array, mask: Array | None) -> tuple[Array, Array]:
        inputs = torch.tensor(x, requires_grad=True)
        y = layer(inputs, training=True, mask=None if mask is None else torch.tensor(mask))
        y.backward(torch.tensor(dy))
        assert inputs.grad is not None
        return y.detach().numpy(), inputs.grad.numpy()

    return step, lambda: [v.value.detach().numpy() for v in (layer.moving_mean, layer.moving_variance)]


def _keras_on_jax(layer: Any) -> Layer:
    import jax

    @jax.jit
    def traced(state: Any, x: Any, dy: Any, mask: Any) -> Any:
        weights = [v.value for v in layer.trainable_variables]

        def call(x: Any) -> Any:
            return layer.stateless_call(weights, state, x, training=True, mask=mask)

        y, pull, state = jax.vjp(call, x, has_aux=True)
        return y, pull(dy)[0], state

    def step(x: Array, dy: Array, mask: Array | None) -> tuple[Array, Array]:
        variables = layer.non_trainable_variables
        y, dx, state = traced([v.value for v in variables], x, dy, mask)
        for variable, value in zip(variables, state, strict=True):
            variable.assign(value)
        return np.asarray(y), np.asarray(dx)

    return step, lambda: [np.asarray(v.value) for v in (layer.moving_mean, layer.moving_variance)]


# ---- JAX ----


def flax_ours(name: str) -> Layer:
    """The adapter's Flax module, which is its function for JAX."""
    import jax
    from flax import nnx

    from bnlayer.adapters.flax import SyncBatchNorm

    layer = SyncBatchNorm(3, momentum=MOMENTUM, epsilon=EPSILON, name=name, rngs=nnx.Rngs(0))

    @nnx.jit
    def traced(layer: Any, x: Any, dy: Any, mask: Any) -> Any:
        return _flax_pull(layer, x, dy, mask)

    def step(x: Array, dy: Array, mask: Array | None) -> tuple[Array, Array]:
        y, dx = jax.block_until_ready(traced(layer, x, dy, mask))
        return np.asarray(y), np.asarray(dx)

    return step, lambda: [np.asarray(layer.mean[...]), np.asarray(layer.var[...])]


def _flax_pull(layer: Any, x: Any, dy: Any, mask: Any) -> Any:
    """y, and the gradient of x where that of y is dy."""
    from flax import nnx

    def loss(layer: Any, x: Any) -> Any:
        y = layer(x, mask=mask)
        return (y * dy).sum(), y

    (_, y), dx = nnx.value_and_grad(loss, argnums=1, has_aux=True)(layer, x)
    return y, dx


def flax_theirs(_name: str) -> Layer:
    """Flax's module with an axis_name: one program over the devices of all processes, each of which gives its rows."""
    import jax
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("ranks",))
    rows, everywhere = PartitionSpec("ranks"), PartitionSpec()
    definition, state = nnx.split(
        nnx.BatchNorm(3, momentum=MOMENTUM, epsilon=EPSILON, axis_name="ranks", rngs=nnx.Rngs(0))
    )
    held = [state]

    def local(state: Any, x: Any, dy: Any, *masks: Any) -> Any:
        layer = nnx.merge(definition, state)
        y, dx = _flax_pull(layer, x, dy, masks[0][..., None] if masks else None)
        return y, dx, nnx.state(layer)

    def step(x: Array, dy: Array, mask: Array | None) -> tuple[Array, Array]:
        arrays = [a for a in (x, dy, mask) if a is not None]
        count = sum(_sizes)
        sharded = [
            jax.make_array_from_process_local_data(NamedSharding(mesh, rows), a, (count, *a.shape[1:])) for a in arrays
        ]
        specs = (everywhere, *[rows] * len(arrays))
        program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(rows, rows, everywhere)))
        y, dx, held[0] = program(held[0], *sharded)
        return tuple(np.asarray(a.addressable_shards[0].data) for a in (y, dx))  # type: ignore[return-value]

    def moving() -> list[Array]:
        values = nnx.to_pure_dict(held[0])
        return [np.asarray(values[key].addressable_shards[0].data) for key in ("mean", "var")]

    return step, moving


# ---- no framework ----


def numpy_ours(name: str) -> Layer:
    """The layer itself."""
    from bnlayer import BatchNormalization

    layer = BatchNormalization(synchronized=True, momentum=MOMENTUM, epsilon=EPSILON, name=name)

    def step(x: Array, dy: Array, mask: Array | None) -> tuple[Array, Array]:
        y, pullback = layer.vjp(x, training=True, mask=mask)
        return y, pullback(dy)[0]

    return step, lambda: layer.state.moving.values


LAYERS: dict[str, Callable[[str], Layer]] = {
    "numpy": numpy_ours,
    "torch": torch_ours,
    "torch, theirs": torch_theirs,
    "torch, other devices": torch_passes,
    "torch, CUDA": lambda name: torch_ours(name, "cuda"),
    "torch, CUDA, theirs": lambda name: torch_theirs(name, "cuda"),
    "keras torch": keras_ours,
    "keras torch, theirs": keras_theirs,
    "keras jax": keras_ours,
    "keras jax, theirs": keras_theirs,
    "keras tensorflow": keras_ours,
    "keras tensorflow, theirs": keras_theirs,
    "flax": flax_ours,
    "flax, theirs": flax_theirs,
}
_sizes: list[int] = []  # of the case that runs


def run(case: Case, make: Callable[[str], Layer], rank: int, ranks: int) -> dict[str, Array]:
    """The steps of a case on this rank's rows; one rank has all of them."""
    _sizes[:] = case.sizes if ranks > 1 else (sum(case.sizes),)
    start = sum(_sizes[:rank])
    mine = slice(start, start + _sizes[rank])
    step, moving = make(case.name)
    seen: dict[str, Array] = {}
    for number in range(STEPS):
        x, dy, mask = data(case, number)
        y, dx = step(x[mine], dy[mine], None if mask is None else mask[mine])
        seen |= {f"y {number}": np.array(y), f"dx {number}": np.array(dx)}
    return seen | dict(zip(("moving mean", "moving variance"), map(np.array, moving()), strict=True))


def main(folder: Path, row: str, names: list[str]) -> None:
    """Run the cases; the ranks find each other as their framework's do."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    rank, ranks, leave = joined(row)
    for name in names:
        at = folder / f"{name}-{rank}"
        try:
            seen = run(CASES[name], LAYERS[row], rank, ranks)
        except Exception as error:  # noqa: BLE001 - what the framework says is what is looked for
            at.with_suffix(".error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            if not _may_go_on(folder, name, ranks):
                os._exit(0)  # `what_works` starts anew with the next case
        else:
            with at.with_suffix(".part").open("wb") as file:
                np.savez(file, **seen)  # type: ignore[arg-type]
            at.with_suffix(".part").rename(at.with_suffix(".npz"))
    leave()


def _may_go_on(folder: Path, name: str, ranks: int) -> bool:
    """Whether the others came out of the case too, by themselves; where not, they wait for this rank, which ends."""
    stopped = folder / "stopped"
    for _ in range(100):
        if stopped.exists():
            return False
        if len([*folder.glob(f"{name}-[0-9]*.error"), *folder.glob(f"{name}-[0-9]*.npz")]) == ranks:
            return True
        time.sleep(0.1)
    stopped.touch()
    return False


def joined(row: str) -> tuple[int, int, Callable[[], object]]:
    """This process's rank, the number of ranks, and how it leaves."""
    if row.startswith("torch"):
        import torch.distributed as dist

        dist.init_process_group("nccl" if row == "torch, CUDA, theirs" else "gloo")
        return dist.get_rank(), dist.get_world_size(), dist.destroy_process_group
    if row.startswith("keras"):
        os.environ["KERAS_BACKEND"] = row.removesuffix(", theirs").removeprefix("keras ")
    if row == "keras tensorflow, theirs":
        cluster = json.loads(os.environ["TF_CONFIG"])
        _strategy()
        return cluster["task"]["index"], len(cluster["cluster"]["worker"]), lambda: None
    if row.endswith("theirs"):
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if row == "flax, theirs":
            import jax

            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(f"127.0.0.1:{os.environ['MASTER_PORT']}", ranks, rank)
        return rank, ranks, lambda: None
    import bnworker

    world = bnworker.join(timeout=60)
    return world.rank, world.world_size, world.leave


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
