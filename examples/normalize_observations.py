"""Observations of a reinforcement-learning job, normalized by the exact moments of all that any rank has seen.

    torchrun --nproc-per-node=2 examples/normalize_observations.py

Normalizers that each rank keeps for itself drift apart, and those that add restored totals count the shared history
once per rank. Here every rank holds the same history, in which each observation counts once, through a restart too: it
is compared, bit for bit, with that of one process that saw everything.
"""

from __future__ import annotations

import numpy as np
import torch.distributed as dist

import bnlayer
from bnlayer import Alone, RunningMoments

STEPS, ENVIRONMENTS, FEATURES = 20, 7, 5


def observations(step: int, environment: int) -> np.ndarray:
    """What an environment shows in a step; episodes end, so that there are more in some steps than in others."""
    rng = np.random.default_rng([step, environment])
    return rng.normal(environment, 1 + step / 10, (rng.integers(0, 4), FEATURES)).astype(np.float32)


def of(step: int, environments: range) -> np.ndarray:
    """The observations of some environments; there may be none."""
    return np.concatenate([np.empty((0, FEATURES), np.float32), *(observations(step, e) for e in environments)])


dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
mine = range(rank, ENVIRONMENTS, ranks)

seen = RunningMoments(FEATURES)
for step in range(STEPS):
    if step == STEPS // 2:  # a restart: every rank goes on from the same state
        state = seen.state_dict()
        seen = RunningMoments(FEATURES)
        seen.load_state_dict(state)
    batch = of(step, mine)
    seen.update(batch)
    normalized = (batch - seen.mean) / np.sqrt(seen.variance + 1e-8)

alone = RunningMoments(FEATURES, collective=Alone())
for step in range(STEPS):
    alone.update(of(step, range(ENVIRONMENTS)))
same = all(mine.tobytes() == one.tobytes() for mine, one in zip(seen.statistics(), alone.statistics(), strict=True))

count, mean, variance = bnlayer.moments(of(STEPS, mine), axis=0)  # of one array: scaling features takes one line
print(f"rank {rank} of {ranks}: {seen.count[0]} observations, the same bits as in one process: {same}", flush=True)
dist.destroy_process_group()
