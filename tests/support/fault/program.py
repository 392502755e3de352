"""What the ranks of a fault test train: the same on every machine, a pure function of seed, rank and step.

Data jump far away and come back now and then, so that exchanges of all lengths occur (sums; probe and sums; sums,
probe and sums), in both directions; beside them reductions, broadcasts, barriers, pulls and pushes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from support.fault.history import Recorder

LAYERS = ("a", "b", "c", "d", "e")
CHANNELS = 3
MOMENTUM = 0.9
EPSILON = 1e-3
JUMP_EVERY = 16  # steps
PUSH_EVERY = 5
SET_EVERY = 4
_LARGE = 150_000  # float64 numbers: more than one message holds


def layers(recorder: Recorder) -> list[BatchNormalization]:
    """The model: each rank begins with statistics of its own, of which rank 0's win."""
    made = []
    for number, name in enumerate(LAYERS):
        bn = BatchNormalization(
            name=name, synchronized=True, momentum=MOMENTUM, epsilon=EPSILON, dtype="float32", collective=recorder
        )
        bn.build((None, CHANNELS))
        bn.moving_mean.assign(np.full(CHANNELS, number + 0.1 * recorder.rank, np.float32))
        made.append(bn)
    return made


def train_step(recorder: Recorder, model: Sequence[BatchNormalization], seed: int, step: int, large_every: int) -> None:
    """One step: every layer forward, every layer backward, and what else a training loop does."""
    rng = np.random.default_rng([seed, recorder.rank, step])
    rows = 3 + recorder.rank
    far = np.float32((0.0, 1000.0, -3e7)[step // JUMP_EVERY % 3])
    if step % SET_EVERY == SET_EVERY - 1:
        # All ranks set other statistics.
        model[step // SET_EVERY % len(model)].moving_mean.assign(np.full(CHANNELS, -step, np.float32))
    for bn in model:
        bn(rng.normal(far, 1.0, (rows, CHANNELS)).astype(np.float32), training=True)
    for bn in reversed(model):
        bn.backward(rng.normal(0.0, 1.0 if far == 0 else 1e-9, (rows, CHANNELS)).astype(np.float32))
    recorder.allreduce(rng.normal(size=4).astype(np.float32), step)
    if step % 7 == 6:
        recorder.broadcast(rng.normal(size=4).astype(np.float32), step % recorder.world_size, step)
    if large_every and step % large_every == large_every - 1:
        recorder.allreduce_large(large(recorder.rank, step), step)
    if step % PUSH_EVERY == PUSH_EVERY - 1:
        _replace(recorder, model, step)


def large(rank: int, step: int) -> NDArray[np.float64]:
    """What a rank puts into a large reduction: integers, so that their sum has one value."""
    return np.random.default_rng([rank, step]).integers(0, 2**20, _LARGE).astype(np.float64)


def _replace(recorder: Recorder, model: Sequence[BatchNormalization], step: int) -> None:
    """Rank 0 pushes other statistics for one of the layers, and all pull them."""
    bn = model[step // PUSH_EVERY % len(model)]
    recorder.barrier(step, "before")
    if recorder.rank == 0:
        bn.moving_mean.assign(np.full(CHANNELS, step, np.float32))
        recorder.replace(bn, step)
    recorder.barrier(step, "after")
    recorder.fetch(bn, step)
