"""The same passes in torch and JAX, one thread each, on the same arrays.

torch sees channels-last data as its own `channels_last` memory format; nothing is converted or copied before the
clock starts. JAX is given what XLA can fuse, compiled beforehand.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NAMES = ("torch", "jax", "mpi4py")
EPSILON = 1e-3


@dataclass(frozen=True)
class Passes:
    """A peer's forward and backward pass over one batch."""

    forward: Callable[[], object]
    backward: Callable[[], object]


def installed() -> dict[str, str | None]:
    """The version of every peer that runs in this environment; None where it is not installed."""
    return {name: importlib.metadata.version(name) if importlib.util.find_spec(name) else None for name in NAMES}


def one_thread() -> None:
    """Let the peers of this process use one thread; to be called before any of them is imported."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    os.environ["NPROC"] = "1"  # the size of XLA's own pool
    os.environ["JAX_PLATFORMS"] = "cpu"


def torch_passes(x: Array, dy: Array, axis: int) -> Passes:
    """`torch.native_batch_norm` and its backward.

    Args:
        x, dy: (N, C), (N, H, W, C) or (N, C, H, W), contiguous.
        axis: of the channels.
    """
    import torch

    torch.set_num_threads(1)

    def seen(array: Array) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.permute(0, 3, 1, 2) if array.ndim == 4 and axis == 3 else tensor

    channels = x.shape[axis]
    given, gradient = seen(x), seen(dy)
    gamma, beta = torch.ones(channels), torch.zeros(channels)
    mean, variance = torch.zeros(channels), torch.ones(channels)

    def forward() -> Any:
        return torch.native_batch_norm(given, gamma, beta, mean, variance, True, 0.01, EPSILON)

    _, saved_mean, saved_inverse = forward()

    def backward() -> Any:
        return torch.ops.aten.native_batch_norm_backward(
            gradient, given, gamma, mean, variance, saved_mean, saved_inverse, True, EPSILON, [True, True, True]
        )

    return Passes(_without_gradients(torch, forward), _without_gradients(torch, backward))


def _without_gradients(torch: Any, run: Callable[[], object]) -> Callable[[], object]:
    def bare() -> object:
        with torch.no_grad():
            return run()

    return bare


def jax_passes(x: Array, dy: Array, axis: int) -> Passes:
    """The formulas, jitted: centered variance, as Keras on JAX."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # the pool that JAX makes when it starts is as large as it sees cores
    import jax
    import jax.numpy as jnp

    jax.devices()
    for thread in Path("/proc/self/task").iterdir():  # it may run on any core all the same
        os.sched_setaffinity(int(thread.name), cores)
    axes = tuple(i for i in range(x.ndim) if i != axis)
    wide = tuple(-1 if i == axis else 1 for i in range(x.ndim))
    divisor = x.size // x.shape[axis]

    @jax.jit
    def forward(x: Any, gamma: Any, beta: Any) -> Any:
        mean = x.mean(axes)
        d = x - mean.reshape(wide)
        variance = (d * d).mean(axes)
        inverse = jax.lax.rsqrt(variance + EPSILON)
        return d * (inverse * gamma).reshape(wide) + beta.reshape(wide), mean, inverse

    @jax.jit
    def backward(dy: Any, x: Any, gamma: Any, mean: Any, inverse: Any) -> Any:
        d = x - mean.reshape(wide)
        a, b = dy.sum(axes), (dy * d).sum(axes)
        slope = (b * inverse * inverse / divisor).reshape(wide)
        dx = ((dy - (a / divisor).reshape(wide)) - d * slope) * (gamma * inverse).reshape(wide)
        return dx, b * inverse, a

    given, gradient = jnp.asarray(x), jnp.asarray(dy)
    gamma, beta = jnp.ones(x.shape[axis], np.float32), jnp.zeros(x.shape[axis], np.float32)
    _, mean, inverse = forward(given, gamma, beta)
    return Passes(
        lambda: jax.block_until_ready(forward(given, gamma, beta)),
        lambda: jax.block_until_ready(backward(gradient, given, gamma, mean, inverse)),
    )
