"""Synchronized batch normalization for JAX: a function with a gradient, under `jax.jit` and `jax.grad`.

    y, moving_mean, moving_variance = sync_batch_norm(x, gamma, beta, moving_mean, moving_variance, name="bn_1")

The exchange with the other ranks is an ordered host callback, forward and backward: all of a program's exchanges happen
in the order in which it was written, going back in the reverse one, so that all ranks that run the same program make
the same ones. What a call saves for its gradient stays in JAX's arrays. See `docs/adapters-jax.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from bnlayer.adapters import host
from bnlayer.adapters.host import HostLayer, Reduction

__all__ = ["allreduce", "sync_batch_norm"]

_layers: dict[str, HostLayer] = {}


def sync_batch_norm(
    x: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    moving_mean: jax.Array,
    moving_variance: jax.Array,
    *,
    axis: int = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    training: bool = True,
    mask: jax.Array | None = None,
    name: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalize a batch with the statistics of all ranks' batches.

        training    y = γ·(x − μ)/√(v + ε) + β          moving ← moving·momentum + batch·(1 − momentum)
        inference   y = γ·(x − moving_mean)/√(moving_variance + ε) + β          nothing is exchanged

    Differentiable in x, gamma and beta. The gradient is that of the SUM over ranks of the local losses; for gamma and
    beta, as for every other weight, it is this rank's share: reduce them all alike, with `allreduce`.

    Under `jax.jit` all but the arrays is static. Not under `vmap`, `jax.checkpoint` or in forward mode, which refuse
    ordered callbacks. A program may still run when its call returns: `jax.block_until_ready` its results before the
    world is used directly, or left.

    Args:
        x: of any rank, (…, C, …); float32, float64, float16 or bfloat16.
        gamma, beta: (C,), or None.
        moving_mean, moving_variance: (C,), the latest. Others than the call before returned are values set by hand:
            all ranks must set them alike.
        axis: the one of the channels.
        momentum: weight of the old value in the moving update.
        epsilon: added to the variance before the root.
        training: whether to use, and exchange, the batch's statistics.
        mask: bool, of one dimension less than x; False keeps a position out of the statistics.
        name: how the ranks know the layer. Two calls of one name are two uses of one layer.

    Returns:
        y, of x's shape and dtype, and the moving statistics after the call.

    Raises:
        ValueError: shapes, dtypes or settings contradict each other, or those of the layer of this name.
        TypeError: x is not of a float dtype.
        RuntimeError: several ranks are announced, but no world was joined.
        jax.errors.JaxRuntimeError: when the program runs: an exchange could not complete; its text holds the
            `CollectiveError`'s.
    """
    x, moving = jnp.asarray(x), (jnp.asarray(moving_mean), jnp.asarray(moving_variance))
    host.check_float(x.dtype, "x")
    if not training:
        return _infer(x, gamma, beta, *moving, axis, epsilon), *moving
    layer = _layer_named(name, x, moving[0], axis, momentum, epsilon, gamma is not None, beta is not None)
    weights = tuple(jnp.asarray(weight) for weight in (gamma, beta) if weight is not None)
    y, (mean, variance) = call(ref(layer), x, weights, moving, mask)
    return y, mean, variance


def allreduce(tree: Any, op: Reduction = "mean") -> Any:
    """The mean, or sum, of every array of a tree over all ranks, in one exchange, under `jax.jit` too.

        gradients = allreduce(jax.grad(loss)(weights))

    It stands in the order of the program's other exchanges, and is not differentiable.

    Args:
        tree: of arrays; the same on all ranks, values apart.
        op: "mean" for losses that are means over equal shards; "sum" for losses that are shares of a global one.

    Raises:
        ValueError: op is neither.
        RuntimeError: several ranks are announced, but no world was joined.
        jax.errors.JaxRuntimeError: when the program runs: an exchange could not complete.
    """
    if host.reducing(op) is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
    return jax.tree.unflatten(structure, io_callback(partial(_allreduced, op), shapes, *leaves, ordered=True))


def _allreduced(op: Reduction, *arrays: Any) -> list[Any]:
    return host.allreduce([np.asarray(array) for array in arrays], op)


@dataclass(frozen=True)
class Callback:
    """A pass of a layer as JAX calls it on the host.

    Equal ones share a compiled program, and JAX keeps programs for good: it must not keep the layer and its name too.

    Attributes:
        layer: whose.
        backward: which pass.
    """

    layer: ref[HostLayer]
    backward: bool = False

    def __call__(self, *tree: Any) -> Any:
        """JAX's arrays in and NumPy's out; `saved` as halves, since JAX has no float64 unless it was asked for it."""
        layer, arrays = self.layer(), jax.tree.map(np.asarray, tree)
        if layer is None:
            raise RuntimeError("The layer of this program was deleted: hold on to the model that it belongs to.")
        if self.backward:
            x, mask, dy, saved = arrays
            return layer.pull_back(x, mask, dy, saved.view(np.float64))
        y, moved, saved = layer.forward(*arrays)
        return y, moved, saved.view(np.uint32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def call(
    layer: ref[HostLayer], x: jax.Array, weights: tuple[jax.Array, ...], moving: tuple[jax.Array, ...], mask: Any
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """A training call of a layer; y, and the moving statistics after it. For the adapters of JAX's libraries."""
    (y, moved), _ = _forward(layer, x, weights, moving, mask)
    return y, moved


def _forward(layer: ref[HostLayer], x: Any, weights: Any, moving: Any, mask: Any) -> tuple[Any, Any]:
    saved_shape = jax.ShapeDtypeStruct((host.SAVED_ROWS, 2 * moving[0].shape[0]), jnp.uint32)
    shapes = (_like(x), tuple(_like(vector) for vector in moving), saved_shape)
    y, moved, saved = io_callback(Callback(layer), shapes, x, weights, moving, mask, ordered=True)
    return (y, moved), (x, weights, mask, saved)


def _backward(layer: ref[HostLayer], residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    x, weights, mask, saved = residuals
    dy, _ = cotangents  # the moving statistics are not differentiated
    shapes = (_like(x), tuple(_like(weight) for weight in weights))
    dx, gradients = io_callback(Callback(layer, backward=True), shapes, x, mask, dy, saved, ordered=True)
    return dx, gradients, None, None


call.defvjp(_forward, _backward)


def _infer(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, axis: int, epsilon: float) -> Any:
    kind = jnp.promote_types(x.dtype, jnp.float32)
    shape = [1] * x.ndim
    shape[axis] = -1
    scale = jax.lax.rsqrt(variance.astype(kind) + epsilon)
    if gamma is not None:
        scale = scale * gamma.astype(kind)
    y = (x.astype(kind) - mean.astype(kind).reshape(shape)) * scale.reshape(shape)
    if beta is not None:
        y = y + beta.astype(kind).reshape(shape)
    return y.astype(x.dtype)


def _layer_named(
    name: str, x: Any, moving: Any, axis: int, momentum: float, epsilon: float, scale: bool, center: bool
) -> HostLayer:
    """The layer of a name: grids and enrolment outlive a program."""
    policy = host.policy_name(x.dtype.name, moving.dtype.name)
    settings = {
        "axis": axis, "momentum": momentum, "epsilon": epsilon, "scale": scale, "center": center, "dtype": policy,
    }  # fmt: skip
    layer = _layers.get(name)
    if layer is None:
        layer = HostLayer(name=name, **settings)
        layer.expect(x.shape)
        return _layers.setdefault(name, layer)
    layer.expect(x.shape)
    has = {key: getattr(layer, key) for key in settings} | {"dtype": layer.dtype_policy.name}
    differing = [key for key, value in settings.items() if has[key] != value]
    if differing:
        text = ", ".join(f"{key}={settings[key]!r} where it had {has[key]!r}" for key in differing)
        raise ValueError(f"Layer {name!r} was called with {text}: calls of one name are one layer. Use another name=.")
    return layer


def _like(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
