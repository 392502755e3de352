"""A convolutional network in JAX, on any number of ranks: bnlayer launch -n 2 -- python examples/jax_digits.py"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import bnworker
from bnlayer.adapters.jax import allreduce, sync_batch_norm

images, labels = load_digits(return_X_y=True)
images, test = images.reshape(-1, 8, 8, 1).astype("float32") / 16, np.arange(len(labels)) % 5 == 0
random = np.random.default_rng(0)  # the same seed on every rank: the same weights, the same order of the rows
BATCH = 64


def block(x, weights, moving, name, training):
    """Convolution, synchronized batch normalization, ReLU."""
    y = jax.lax.conv_general_dilated(x, weights["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y, *moving = sync_batch_norm(
        y, weights["gamma"], weights["beta"], *moving, momentum=0.9, training=training, name=name
    )
    return jax.nn.relu(y), moving


def network(weights, moving, x, training):
    """Scores, and the moving statistics after the call."""
    moving = dict(moving)
    for name in ("bn_1", "bn_2"):
        x, moving[name] = block(x, weights[name], moving[name], name, training)
    return x.reshape(len(x), -1) @ weights["out"], moving


def loss(weights, moving, x, y):
    """This rank's share of the batch's mean loss."""
    scores, moving = network(weights, moving, x, training=True)
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), y[:, None], 1).sum() / BATCH, moving


@jax.jit
def step(weights, moving, x, y):
    """One step: the exchanges of the layers and of the gradients are part of the program."""
    gradients, moving = jax.grad(loss, has_aux=True)(weights, moving, x, y)
    gradients = allreduce(gradients, op="sum")  # the shares of all ranks
    return jax.tree.map(lambda weight, gradient: weight - 0.1 * gradient, weights, gradients), moving


weights, moving = {"out": random.standard_normal((512, 10)).astype("float32") * 0.05}, {}
for name, shape in (("bn_1", (3, 3, 1, 16)), ("bn_2", (3, 3, 16, 32))):
    kernel = random.standard_normal(shape).astype("float32") / 9
    zeros, ones = np.zeros(shape[-1], "float32"), np.ones(shape[-1], "float32")
    weights[name], moving[name] = {"kernel": kernel, "gamma": ones, "beta": zeros}, [zeros, ones]

with bnworker.join() as world:
    for _ in range(6):
        order = random.permutation(np.flatnonzero(~test))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            mine = batch[world.shard(BATCH)]  # shards may be uneven
            weights, moving = step(weights, moving, images[mine], labels[mine])
    jax.block_until_ready(weights)  # before the world is left
    scores, _ = network(weights, moving, images[test], training=False)  # inference: no exchange
    if world.rank == 0:
        accuracy = np.mean(np.argmax(scores, axis=1) == labels[test])
        print(f"jax, {world.world_size} rank(s): {accuracy:.1%} of the test rows", flush=True)
