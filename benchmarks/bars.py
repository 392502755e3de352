"""What must be reached and what is aimed at, in one table, and the judgement.

A bar has figures; the worst of them counts. A figure that was not measured misses its bar, unless it needs a peer
that is not installed. A bar says nothing about a section that did not run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

FIRST_PASSES = "32,14,14,256", "32,7,7,512"
LARGER = "32,56,56,64", "32,28,28,128", "4096,1024"
FIRST = "NCHW 32,64,56,56"
EVERY = (*FIRST_PASSES, *LARGER, FIRST)


class Verdict(StrEnum):
    """What became of a bar."""

    AIM = "aim reached"
    MUST = "must reached"
    MISSED = "MISSED"
    NO_PEER = "peer not installed"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: what it is about.
        figures: names of the figures; the worst one counts.
        must, aim: the bounds; aim None where there is none beyond must.
        at_least: the bounds are lower ones: more is better.
        peer: what must be installed for it.
        scale, unit: how the figure is shown: times `scale`, in `unit`.
    """

    name: str
    figures: tuple[str, ...]
    must: float
    aim: float | None = None
    at_least: bool = False
    peer: str | None = None
    scale: float = 1.0
    unit: str = "x"

    @property
    def section(self) -> str:
        """The section whose figures it judges."""
        return self.figures[0].partition("/")[0]


@dataclass(frozen=True)
class Judgement:
    """A bar, what was seen, and what became of it.

    Attributes:
        bar: the bar.
        verdict: what became of it.
        seen: the worst figure; NaN where there is none.
        worst: that figure's name.
    """

    bar: Bar
    verdict: Verdict
    seen: float
    worst: str


def _kernels(shapes: Iterable[str], figure: str) -> tuple[str, ...]:
    return tuple(f"kernels/{shape}/{figure}" for shape in shapes)


def _mpi(figure: str) -> tuple[str, ...]:
    return tuple(f"mpi/2 ranks/C={c}/{figure}" for c in (64, 256, 1024, 2048))


_THREADED = tuple(f"threads/32,7,7,{c}/{which}, two vs one" for c in (128, 256) for which in ("forward", "backward"))
_OTHERS = tuple(shape for shape in EVERY if shape != "32,56,56,64")

BARS = (
    Bar("forward ÷ limit, small shapes", _kernels(FIRST_PASSES, "forward/compiled/limits"), 1.9, 1.3),
    Bar("forward ÷ limit, larger shapes", _kernels(LARGER, "forward/compiled/limits"), 2.3, 1.5),
    Bar("backward ÷ limit, small shapes", _kernels(FIRST_PASSES, "backward/compiled/limits"), 1.9, 1.3),
    Bar("backward ÷ limit, larger shapes", _kernels(LARGER, "backward/compiled/limits"), 2.6, 1.6),
    Bar("forward ÷ limit, channels first", _kernels([FIRST], "forward/compiled/limits"), 2.1, 1.4),
    Bar("backward ÷ limit, channels first", _kernels([FIRST], "backward/compiled/limits"), 1.5, 1.2),
    Bar(
        "forward, speed vs torch, 32,56,56,64",
        _kernels(["32,56,56,64"], "forward/compiled vs torch"),
        0.8,
        1.2,
        at_least=True,
        peer="torch",
    ),
    Bar(
        "forward, speed vs torch, other shapes",
        _kernels(_OTHERS, "forward/compiled vs torch"),
        0.9,
        1.2,
        at_least=True,
        peer="torch",
    ),
    Bar(
        "backward, speed vs torch, every shape",
        _kernels(EVERY, "backward/compiled vs torch"),
        0.8,
        1.0,
        at_least=True,
        peer="torch",
    ),
    Bar("forward, exact ÷ float kernels", _kernels(EVERY, "forward/compiled ÷ float"), 1.4, 1.15),
    Bar("backward, exact ÷ float kernels", _kernels(EVERY, "backward/compiled ÷ float"), 1.3, 1.0),
    Bar("masked ÷ unmasked forward", _kernels(EVERY, "compiled/masked ÷ unmasked"), 2.0, 1.3),
    Bar("whole call (32,64), time ÷ torch", ("layer/32,64/call ÷ torch",), 1.4, peer="torch"),
    Bar("a call beyond its kernels", ("layer/32,14,14,256/call − kernels",), 25e-6, scale=1e6, unit="µs"),
    Bar("two threads, speed vs one, arrays in the caches", _THREADED, 1.7, at_least=True),
    Bar("call: peak extra memory ÷ output", ("layer/memory/call ÷ output",), 1.1),
    Bar("backward: peak extra memory ÷ dx", ("layer/memory/backward ÷ dx",), 1.1),
    Bar("variance error at mean 1e4", ("accuracy/variance",), 2e-6, unit=""),
    Bar("output error at mean 1e4", ("accuracy/output",), 2e-6, unit=""),
    Bar("import", ("starting/import",), 0.15, unit="s"),
    Bar("first training calls, backwards and inferences of a process", ("starting/first calls",), 0.3, unit="s"),
    Bar(
        "MPI: the exchange above a bare Iallreduce",
        _mpi("exchange − bare"),
        10e-6,
        4e-6,
        peer="mpi4py",
        scale=1e6,
        unit="µs",
    ),
    Bar("service exchange ÷ raw socket, 2 ranks", ("service/2 ranks/C=256/exchange ÷ socket",), 10.0, 6.0),
    Bar(
        "10 layers: TensorFlow's step ÷ ours, MPI",
        ("step/tensorflow ÷ mpi",),
        3.0,
        6.0,
        at_least=True,
        peer="tensorflow",
    ),
    Bar(
        "10 layers: TensorFlow's step ÷ ours, service",
        ("step/tensorflow ÷ service",),
        2.5,
        4.0,
        at_least=True,
        peer="tensorflow",
    ),
)


def narrowed(bars: Iterable[Bar], shapes: Collection[str]) -> list[Bar]:
    """The bars for a run of some of the kernels' shapes: their figures of other shapes don't count."""
    narrow = []
    for bar in bars:
        present = tuple(f for f in bar.figures if not f.startswith("kernels/") or f.split("/")[1] in shapes)
        if present:
            narrow.append(replace(bar, figures=present))
    return narrow


def compare(
    bars: Iterable[Bar], figures: Mapping[str, float], *, ran: Collection[str], missing: Collection[str]
) -> list[Judgement]:
    """Hold the figures against the bars.

    Args:
        bars: the table.
        figures: what was measured, by name.
        ran: the sections that ran.
        missing: the peers that are not installed.
    """
    return [_verdict(bar, figures, ran, missing) for bar in bars]


def _verdict(bar: Bar, figures: Mapping[str, float], ran: Collection[str], missing: Collection[str]) -> Judgement:
    if bar.section not in ran:
        return Judgement(bar, Verdict.NOT_RUN, math.nan, "")
    if bar.peer in missing:
        return Judgement(bar, Verdict.NO_PEER, math.nan, "")
    unmeasured = [name for name in bar.figures if not math.isfinite(figures.get(name, math.nan))]
    if unmeasured:
        return Judgement(bar, Verdict.MISSED, math.nan, f"not measured: {unmeasured[0]}")
    worst = (min if bar.at_least else max)(bar.figures, key=lambda name: figures[name])
    seen = figures[worst]
    if not within(seen, bar.must, bar.at_least):
        return Judgement(bar, Verdict.MISSED, seen, worst)
    reached = bar.aim is None or within(seen, bar.aim, bar.at_least)
    return Judgement(bar, Verdict.AIM if reached else Verdict.MUST, seen, worst)


def within(seen: float, bound: float, at_least: bool) -> bool:
    """Whether a figure keeps to a bound."""
    return seen >= bound if at_least else seen <= bound


def exit_code(judgements: Iterable[Judgement], *, enforced: bool) -> int:
    """1 if a "must" is missed and the machine was quiet enough for a verdict, else 0."""
    return int(enforced and any(j.verdict is Verdict.MISSED for j in judgements))
