"""What the suite consists of: each section returns its figures by name, `section/…`.

A section is imported when it runs, after the peers' threads were limited.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Figures = dict[str, float]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        full: everything, rather than what fits into three minutes.
        peers: versions of those that are installed; None for those that are not.
        tensorflow_python: the interpreter that has TensorFlow.
        shapes: the kernels' shapes to run; empty for all.
        report: where progress goes.
    """

    full: bool
    peers: Mapping[str, str | None]
    tensorflow_python: str
    shapes: tuple[str, ...]
    report: Report

    @property
    def missing(self) -> list[str]:
        """The peers that are not installed."""
        return [name for name, version in self.peers.items() if version is None]

    @property
    def available(self) -> list[str]:
        """The peers that are installed."""
        return [name for name, version in self.peers.items() if version is not None]


def kernels(settings: Settings) -> Figures:
    """The passes over the data, by shape: each in a process of its own, which no other shape's memory is left in."""
    from benchmarks.kernels import SHAPES
    from benchmarks.processes import alone

    figures: Figures = {}
    for number, shape in enumerate(SHAPES):
        if not settings.shapes or str(shape) in settings.shapes:
            settings.report(f"kernels {shape}")
            budget_s = (3.0 + shape.elements / 2**20) * (3 if settings.full else 1)  # as many turns, more or less
            figures |= alone("benchmarks.kernels", str(number), str(budget_s), *settings.available)
    return figures


def layer(settings: Settings) -> Figures:
    """The layer as a whole: calls, steps, memory."""
    from benchmarks import layer as layer_section
    from benchmarks.kernels import SHAPES
    from benchmarks.timing import keep_memory

    keep_memory()
    settings.report("layer: a small call")
    figures = layer_section.small_call(settings.available, 2.0)
    for shape in SHAPES if settings.full else SHAPES[2:4]:
        settings.report(f"layer: {shape} beside its kernels")
        figures |= layer_section.beyond_kernels(shape, 8.0 if settings.full else 2.0)
    settings.report("layer: memory")
    return figures | layer_section.memory()


def threads(settings: Settings) -> Figures:
    """Two threads beside one."""
    from benchmarks.processes import alone

    if len(os.sched_getaffinity(0)) < 2:
        settings.report("threads: this process has one core, NOT MEASURED")
        return {}
    settings.report("threads: two beside one")
    return alone("benchmarks.threads", "8" if settings.full else "2")


def accuracy(settings: Settings) -> Figures:
    """Errors of variance and output at mean 1e4."""
    from benchmarks.layer import accuracy as errors

    return errors(3 if settings.full else 1)


def starting(settings: Settings) -> Figures:
    """Import and first calls in fresh processes."""
    from benchmarks.starting import measure

    settings.report("starting: fresh processes")
    return measure(11 if settings.full else 5)


def mpi(settings: Settings) -> Figures:
    """An exchange of a layer over MPI, beside a bare one."""
    from benchmarks.exchange_mpi import measure

    # Two ranks take microseconds: a thousand rounds would be over within one disturbance.
    return _by_ranks(
        "mpi", "mpi4py", lambda ranks, repetitions: measure(ranks, repetitions * (10 if ranks == 2 else 1)), settings
    )


def gloo(settings: Settings) -> Figures:
    """torch's all_reduce of the same bytes."""
    from benchmarks.exchange_gloo import measure

    return _by_ranks("gloo", "torch", measure, settings)


def service(settings: Settings) -> Figures:
    """An exchange of a layer over the service, beside raw sockets."""
    from benchmarks.exchange import figures

    return _by_ranks("service", "", figures, settings)


def _by_ranks(name: str, needed: str, measure: Callable[[int, int], Figures], settings: Settings) -> Figures:
    figures: Figures = {}
    if needed in settings.missing:
        settings.report(f"{name}: {needed} is NOT INSTALLED")
        return figures
    # More ranks than cores take turns on them: milliseconds an exchange.
    for ranks, repetitions in ((2, 2000), (4, 300), (8, 200)) if settings.full else ((2, 1000), (4, 100)):
        settings.report(f"{name}: {ranks} ranks")
        figures |= measure(ranks, repetitions)
    return figures


def step(settings: Settings) -> Figures:
    """Ten layers, forward and backward: alone, as two ranks, and in TensorFlow."""
    from benchmarks import steps, steps_tensorflow

    number = 100 if settings.full else 30
    settings.report("step: ten layers alone, over MPI, over the service")
    figures = steps.measure(number)
    if "tensorflow" in settings.missing:
        settings.report("step: TensorFlow is NOT INSTALLED; --tensorflow-python names an interpreter that has it")
        return figures
    settings.report("step: ten layers in TensorFlow")
    figures |= steps_tensorflow.measure(settings.tensorflow_python, number // 2)  # each takes several of ours
    for ours in ("mpi", "service"):
        if f"step/{ours}" in figures:
            figures[f"step/tensorflow ÷ {ours}"] = figures["step/tensorflow"] / figures[f"step/{ours}"]
    return figures


SECTIONS: dict[str, Callable[[Settings], Figures]] = {
    "kernels": kernels,
    "layer": layer,
    "threads": threads,
    "accuracy": accuracy,
    "starting": starting,
    "mpi": mpi,
    "service": service,
    "gloo": gloo,
    "step": step,
}
