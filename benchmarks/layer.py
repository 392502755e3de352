"""The layer as a whole: one call, one step, and the memory they take.

Figures:

    layer/32,64/call/seconds, layer/32,64/call ÷ torch      a training call on a small batch, where fixed costs show
    layer/SHAPE/call − kernels/seconds, …/step − kernels    what a call, and a call with its backward, cost beyond
                                                            the kernels
    layer/memory/call ÷ output, layer/memory/backward ÷ dx  the peak of extra memory, the worst shape's
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.kernels import BACKWARD, FORWARD, Batch, Shape, ours
from benchmarks.timing import timed
from bnlayer import BatchNormalization
from bnlayer.kernels import kernels

SMALL = Shape((32, 64))
MEMORY_SHAPES = (Shape((32, 56, 56, 64)), Shape((32, 64, 56, 56), 1))


def small_call(available: list[str], budget_s: float) -> dict[str, float]:
    """A training call at (32, 64), beside torch's module, gradients recorded as in training."""
    batch = Batch.of(SMALL)
    called, layer = BatchNormalization(), BatchNormalization()
    runs: dict[str, Callable[[], object]] = {
        "call": lambda: called(batch.x, training=True),
        "step": lambda: (layer(batch.x, training=True), layer.backward(batch.dy)),
    }
    if "torch" in available:
        runs |= _torch_runs(batch)
    seconds_of = {name: contender.seconds for name, contender in timed(runs, budget_s).items()}
    figures = {f"layer/{SMALL}/{name}/seconds": seconds for name, seconds in seconds_of.items()}
    if "torch" in available:
        figures[f"layer/{SMALL}/call ÷ torch"] = seconds_of["call"] / seconds_of["torch call"]
        figures[f"layer/{SMALL}/step ÷ torch"] = seconds_of["step"] / seconds_of["torch step"]
    return figures


def _torch_runs(batch: Batch) -> dict[str, Callable[[], object]]:
    import torch

    torch.set_num_threads(1)
    module = torch.nn.BatchNorm1d(batch.x.shape[1]).train()
    x, dy = torch.from_numpy(batch.x), torch.from_numpy(batch.dy)
    wanted = torch.from_numpy(batch.x.copy()).requires_grad_()

    def step() -> Any:
        wanted.grad = None
        module.zero_grad()
        return module(wanted).backward(dy)

    return {"torch call": lambda: module(x), "torch step": step}


def beyond_kernels(shape: Shape, budget_s: float) -> dict[str, float]:
    """What the layer's own arithmetic costs: its call and step beside the kernels alone, the set in force."""
    batch = Batch.of(shape)
    called, layer = BatchNormalization(axis=shape.axis), BatchNormalization(axis=shape.axis)
    bare = ours(kernels(), "bare", batch)
    forward, backward = bare[FORWARD, "bare"], bare[BACKWARD, "bare"]
    contenders = timed(
        {
            "call": lambda: called(batch.x, training=True),
            "step": lambda: (layer(batch.x, training=True), layer.backward(batch.dy)),
            "kernels of a call": forward,
            "kernels of a step": lambda: (forward(), backward()),
        },
        budget_s,
    )
    seconds = {name: contender.seconds for name, contender in contenders.items()}
    figures = {f"layer/{shape}/{name}/seconds": value for name, value in seconds.items()}
    for what in ("call", "step"):
        # Of the turns of one round, which met the same memory: where a new array lies decides more than what is sought.
        pairs = zip(contenders[what].turns, contenders[f"kernels of a {what}"].turns, strict=True)
        figures[f"layer/{shape}/{what} − kernels"] = median(whole - kernels for whole, kernels in pairs)
    return figures


def memory(shapes: tuple[Shape, ...] = MEMORY_SHAPES) -> dict[str, float]:
    """The peak of extra memory, each shape in a fresh process."""
    figures: dict[str, float] = {}
    worst = {"call ÷ output": 0.0, "backward ÷ dx": 0.0}
    for shape in shapes:
        command = [sys.executable, "-m", "benchmarks.memory", *map(str, shape.sizes), "--axis", str(shape.axis)]
        ended = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120
        )
        for what, ratio in json.loads(ended.stdout).items():
            figures[f"layer/memory/{shape}/{what}"] = ratio
            worst[what] = max(worst[what], ratio)
    return figures | {f"layer/memory/{what}": ratio for what, ratio in worst.items()}


def accuracy(seeds: int) -> dict[str, float]:
    """The worst errors of the layer at mean 1e4, as `benchmarks/accuracy.py` takes them."""
    from benchmarks.accuracy import SHAPES, errors, this_layer

    worst: dict[str, float] = {}
    for seed in range(seeds):
        for shape in SHAPES:
            x = (np.random.default_rng(seed).standard_normal(shape) + 1e4).astype(np.float32)
            for what, error in errors(this_layer, x).items():
                worst[f"accuracy/{what}"] = max(error, worst.get(f"accuracy/{what}", 0.0))
    return worst
