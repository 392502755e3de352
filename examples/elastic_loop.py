"""A loop that goes on when ranks are lost: bnlayer launch -n 4 --elastic 2:4 -- python examples/elastic_loop.py"""

import os
import signal

import numpy as np
from sklearn.datasets import load_digits

import bnworker
from bnlayer import BatchNormalization

EPOCHS, BATCHES = 5, 24
CRASH = int(os.environ.get("CRASH_AT_STEP", "-1"))  # where one process kills itself, to show what happens
FIRST = os.environ.get("BNLAYER_RANK") == "1" and "BNLAYER_RESTART_COUNT" not in os.environ

x, y = load_digits(return_X_y=True)
x, test = x / 16.0, np.arange(len(y)) % 5 == 0
random = np.random.default_rng(0)  # the same seed on every rank, a restarted one included
norm = BatchNormalization(synchronized=True, name="bn_1", dtype="float64", momentum=0.9)
norm.build((None, 64))
# All that a rank needs to go on: the layer's weights, statistics and grids, the other weights, and how far the job is.
state = bnworker.State(
    layers=[norm], first=random.standard_normal((64, 64)) * 0.2, second=random.standard_normal((64, 10)) * 0.2, step=0
)

for generation in bnworker.elastic(state):  # a pass for each set of ranks; the state is then the one saved last
    with generation as world:
        while state.step < EPOCHS * BATCHES:
            epoch, number = divmod(state.step, BATCHES)
            rows = np.random.default_rng(epoch).permutation(np.flatnonzero(~test))  # follows from the step alone
            batch = np.array_split(rows, BATCHES)[number]
            mine = batch[world.shard(len(batch))]  # split anew, over the ranks that there are now
            hidden = np.maximum(norm(x[mine] @ state.first, training=True), 0.0)
            scores = np.exp(hidden @ state.second)
            error = (scores / scores.sum(axis=1, keepdims=True) - np.eye(10)[y[mine]]) / len(batch)
            inner = norm.backward(error @ state.second.T * (hidden > 0))
            if state.step == CRASH and FIRST:
                os.kill(os.getpid(), signal.SIGKILL)
            dfirst, dsecond = world.allreduce([x[mine].T @ inner, hidden.T @ error])
            state.first, state.second = state.first - 0.5 * dfirst, state.second - 0.5 * dsecond
            for weight in norm.trainable_weights:
                weight.assign(weight.value - 0.5 * weight.gradient)
            state.step += 1
            if number + 1 < BATCHES:
                state.save()  # a copy in memory: what is lost with a rank is the step under way
                continue
            if world.rank == 0:
                scores = np.maximum(norm(x[test] @ state.first), 0.0) @ state.second
                right = np.mean(scores.argmax(axis=1) == y[test])
                print(f"epoch {epoch + 1}: {right:.1%} of the test rows, {world.world_size} ranks", flush=True)
            state.commit()  # and here ranks that wait are let in
