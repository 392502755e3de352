"""The passes over the data, beside the memory's limit, float kernels, torch and JAX.

    python -m benchmarks.kernels RESULT.json NUMBER SECONDS [PEER ...]     one of SHAPES

Figures, by shape, in seconds or as ratios:

    kernels/SHAPE/PASS/CONTENDER/seconds    PASS: forward, backward, masked forward, or one of the four kernels
    kernels/SHAPE/PASS/CONTENDER/limits     time ÷ limit

A pass is timed as the layer makes it: its second kernel right after its first, the output newly allocated.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import limits, peers
from benchmarks.float_kernels import FloatKernels
from benchmarks.processes import write
from benchmarks.timing import Contender, keep_memory, timed
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import Kernels, reference
from bnlayer.kernels.compiled import Compiled, variants
from bnlayer.moments import BatchStatistics, Moments

Array = NDArray[Any]
Runs = dict[tuple[str, str], Callable[[], object]]  # by (pass, contender)

FORWARD, BACKWARD, MASKED = "forward", "backward", "masked forward"
PASSES = (FORWARD, BACKWARD)
PARTS = {"moments": 0, "normalize": 1, "gradient_sums": 2, "input_gradient": 3}
OURS = ("reference", "compiled")
FRAMEWORKS = {"torch": peers.torch_passes, "jax": peers.jax_passes}


@dataclass(frozen=True)
class Shape:
    """A batch's shape.

    Attributes:
        sizes: of its axes.
        axis: of the channels.
    """

    sizes: tuple[int, ...]
    axis: int = -1

    @property
    def elements(self) -> int:
        """Their number."""
        return int(np.prod(self.sizes))

    def __str__(self) -> str:
        return ("NCHW " if self.axis == 1 and len(self.sizes) == 4 else "") + ",".join(map(str, self.sizes))


SHAPES = (
    Shape((32, 56, 56, 64)),
    Shape((32, 28, 28, 128)),
    Shape((32, 14, 14, 256)),
    Shape((32, 7, 7, 512)),
    Shape((4096, 1024)),
    Shape((32, 64, 56, 56), 1),
)


@dataclass(frozen=True)
class Batch:
    """What all contenders get: normal data with a mean, its gradient, and a mask of nine in ten rows.

    Attributes:
        x, dy: of the batch's own shape.
        mask: of one dimension less.
        axis: of the channels, not negative.
        seen: x, dy and the mask as the kernels see them, (A, C, B).
        grid, backward_grid: as a probe found them.
        statistics: of x.
    """

    x: Array
    dy: Array
    axis: int
    seen: tuple[Array, Array, Array]
    grid: Grid
    backward_grid: BackwardGrid
    statistics: BatchStatistics

    @classmethod
    def of(cls, shape: Shape) -> Batch:
        """A batch from a seed."""
        rng = np.random.default_rng(0)
        x = (rng.standard_normal(shape.sizes, np.float32) + np.float32(0.5)).astype(np.float32)
        dy = rng.standard_normal(shape.sizes, np.float32)
        axis = shape.axis % x.ndim
        flat = (int(np.prod(shape.sizes[:axis])), shape.sizes[axis], int(np.prod(shape.sizes[axis + 1 :])))
        mask = rng.random(shape.sizes[:-1]) < 0.9
        seen_mask = mask.reshape(-1, 1, 1)
        if axis != x.ndim - 1:  # the layer expands a mask on the last axis, whatever it is
            seen_mask = np.broadcast_to(mask[..., None], shape.sizes).reshape(flat)
        x3, dy3 = x.reshape(flat), dy.reshape(flat)
        everywhere = np.ones(flat[1], bool)
        grid = Grid.unknown("float32", flat[1])
        grid = grid.probed(reference.probe(x3, None, grid), everywhere)
        statistics = Moments(reference.moments(x3, None, grid), grid).statistics(peers.EPSILON, False)
        backward = BackwardGrid.unknown("float32", flat[1]).reaching(statistics.reach)
        keys = reference.gradient_probe(dy3, x3, statistics.pivot, backward)
        return cls(x, dy, axis, (x3, dy3, seen_mask), grid, backward.probed(keys, everywhere), statistics)


def ours(kernels: Kernels, name: str, batch: Batch) -> Runs:
    """The runs of one of this project's kernel sets."""
    (x, dy, mask), grid, backward_grid = batch.seen, batch.grid, batch.backward_grid
    mean, pivot, nonfinite = batch.statistics.rounded_mean, batch.statistics.pivot, np.zeros(x.shape[1], bool)
    scale = batch.statistics.inverse_std.astype(np.float32)
    small = np.full(x.shape[1], 0.01, np.float32)

    def moments() -> object:
        return kernels.moments(x, None, grid)

    def normalize() -> object:
        return kernels.normalize(x, mean, scale, small, nonfinite)

    def sums() -> object:
        return kernels.gradient_sums(dy, x, None, pivot, backward_grid, fits=True)  # as after any sound forward pass

    def gradient() -> object:
        return kernels.input_gradient(dy, x, None, mean, small, small, scale, nonfinite)

    parts = dict(zip(PARTS, (moments, normalize, sums, gradient), strict=True))
    return {
        (FORWARD, name): _in_turn(moments, normalize),
        (BACKWARD, name): _in_turn(sums, gradient),
        (MASKED, name): _in_turn(lambda: kernels.moments(x, mask, grid), normalize),
        **{(part, name): run for part, run in parts.items()},
    }


def floats(batch: Batch) -> Runs:
    """The runs of the float kernels: with either walk, and before this project's own writing passes."""
    x, dy, _ = batch.seen
    mean, scale = batch.statistics.rounded_mean, batch.statistics.inverse_std.astype(np.float32)
    pivot, small = batch.grid.pivot_C.astype(np.float32), np.full(x.shape[1], 0.01, np.float32)
    runs: Runs = {}
    for walk, kernels in (("forwards", FloatKernels(False)), ("from the end", FloatKernels(True))):
        bound = (
            lambda k=kernels: k.moments(x, pivot),
            lambda k=kernels: k.normalize(x, mean, scale, small),
            lambda k=kernels: k.gradient_sums(dy, x, mean),
            lambda k=kernels: k.input_gradient(dy, x, mean, small, small, scale),
        )
        runs[FORWARD, f"float, {walk}"] = _in_turn(bound[0], bound[1])
        runs[BACKWARD, f"float, {walk}"] = _in_turn(bound[2], bound[3])
        runs |= {(part, f"float, {walk}"): run for part, run in zip(PARTS, bound, strict=True)}
    writing = ours(kernel_sets()["compiled"], "compiled", batch)
    for which, reading, written in ((FORWARD, *list(PARTS)[:2]), (BACKWARD, *list(PARTS)[2:])):
        runs[which, "float, written as here"] = _in_turn(runs[reading, "float, forwards"], writing[written, "compiled"])
    return runs


def probes(batch: Batch) -> Runs:
    """The runs of the limit probes, in every variant."""
    x, dy, _ = batch.seen
    runs: Runs = {}
    for which, by_variant in ((FORWARD, limits.forward(x)), (BACKWARD, limits.backward(dy, x))):
        first, second = list(PARTS)[:2] if which == FORWARD else list(PARTS)[2:]
        for variant, (read, written) in by_variant.items():
            runs[which, f"limit, {variant}"] = _in_turn(read, written)
            reading, writing = variant.split(", ")
            runs[first, f"limit, {reading}"], runs[second, f"limit, {writing}"] = read, written
    return runs


def frameworks(batch: Batch, available: Iterable[str]) -> Runs:
    """The runs of the peers that are installed."""
    runs: Runs = {}
    for name, passes in FRAMEWORKS.items():
        if name in available:
            peer = passes(batch.x, batch.dy, batch.axis)
            runs[FORWARD, name], runs[BACKWARD, name] = peer.forward, peer.backward
    return runs


def kernel_sets() -> dict[str, Kernels]:
    """This project's kernel sets by name: of the compiled one, the variant that the processor takes."""
    return {"reference": reference, "compiled": Compiled(variants()[0])}


def measure(shape: Shape, budget_s: float, available: Iterable[str]) -> dict[str, float]:
    """All figures of one shape."""
    batch = Batch.of(shape)
    runs = probes(batch) | floats(batch)
    for name, kernels in kernel_sets().items():
        runs |= ours(kernels, name, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch, of arrays that it may not write to
        runs |= frameworks(batch, available)
    contenders = timed({f"{which}/{name}": run for (which, name), run in runs.items()}, budget_s)
    return figures(str(shape), contenders)


def figures(shape: str, contenders: dict[str, Contender]) -> dict[str, float]:
    """Seconds and ratios; of the probes and float kernels, the best variant's."""
    seconds: dict[tuple[str, str], float] = {}
    result: dict[str, float] = {}
    for label, contender in contenders.items():
        which, _, name = label.partition("/")
        kind = name.partition(",")[0]
        seconds[which, kind] = min(contender.seconds, seconds.get((which, kind), float("inf")))
        if kind in FRAMEWORKS:
            result[f"kernels/{shape}/{which}/{kind}/cores"] = contender.cores
    for (which, kind), time in seconds.items():
        result[f"kernels/{shape}/{which}/{kind}/seconds"] = time
        limit = seconds.get((FORWARD if which == MASKED else which, "limit"))
        if limit is not None and kind != "limit":
            result[f"kernels/{shape}/{which}/{kind}/limits"] = time / limit
    for name in OURS:
        if (FORWARD, name) in seconds:
            result |= _compared(shape, name, seconds)
    return result


def _compared(shape: str, name: str, seconds: dict[tuple[str, str], float]) -> dict[str, float]:
    """A kernel set beside the float kernels and torch, and with a mask beside without."""
    result = {f"kernels/{shape}/{name}/masked ÷ unmasked": seconds[MASKED, name] / seconds[FORWARD, name]}
    for which in PASSES:
        result[f"kernels/{shape}/{which}/{name} ÷ float"] = seconds[which, name] / seconds[which, "float"]
        for peer in FRAMEWORKS:
            if (which, peer) in seconds:
                result[f"kernels/{shape}/{which}/{name} vs {peer}"] = seconds[which, peer] / seconds[which, name]
    return result


def _in_turn(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], object]:
    def both() -> object:
        first()
        return second()

    return both


def main(result: str, number: str, budget_s: str, *available: str) -> None:
    """Measure one shape in this process."""
    keep_memory()
    peers.one_thread()
    write(result, measure(SHAPES[int(number)], float(budget_s), available))


if __name__ == "__main__":
    main(*sys.argv[1:])
