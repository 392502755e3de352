"""A training loop of your own, on any number of ranks: bnlayer launch -n 3 -- python examples/own_loop.py"""

import numpy as np
from sklearn.datasets import load_digits

import bnworker
from bnlayer import BatchNormalization

x, y = load_digits(return_X_y=True)
x, test = x / 16.0, np.arange(len(y)) % 5 == 0
random = np.random.default_rng(0)  # the same seed on every rank: the same weights, the same order of the rows
first, second = random.standard_normal((64, 64)) * 0.2, random.standard_normal((64, 10)) * 0.2

with bnworker.join() as world:
    norm = BatchNormalization(synchronized=True, name="bn_1", dtype="float64", momentum=0.9)
    for epoch in range(5):
        for batch in np.array_split(random.permutation(np.flatnonzero(~test)), 24):
            mine = batch[world.shard(len(batch))]  # this rank's rows of the batch
            hidden = np.maximum(norm(x[mine] @ first, training=True), 0.0)  # normalized by all ranks' rows
            scores = np.exp(hidden @ second)
            error = (scores / scores.sum(axis=1, keepdims=True) - np.eye(10)[y[mine]]) / len(batch)
            inner = norm.backward(error @ second.T * (hidden > 0))  # and so is the gradient
            dfirst, dsecond = world.allreduce([x[mine].T @ inner, hidden.T @ error])  # add up the ranks' shares
            first, second = first - 0.5 * dfirst, second - 0.5 * dsecond
            for weight in norm.trainable_weights:  # their gradients are those of all ranks already
                weight.assign(weight.value - 0.5 * weight.gradient)
        scores = np.maximum(norm(x[test] @ first), 0.0) @ second  # inference: moving statistics, no exchange
        if world.rank == 0:
            print(f"epoch {epoch + 1}: {np.mean(scores.argmax(axis=1) == y[test]):.1%} of the test rows", flush=True)
