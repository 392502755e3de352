"""A missed bar is measured a second time, at the end of the run; what is slow stays slow.

A virtual machine's host may be busy for a minute, which no load average of its own shows; and where the memory
of a process lies is drawn once for all its turns. Either only adds time, to one contender or to all. So where a bar is
missed, its figures are measured once more, with all those that they are compared with, and a bar that is reached in
either measurement is reached. A figure is never taken from one, and what it is divided by from the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from benchmarks.bars import Bar, Judgement, Verdict, within
from benchmarks.sections import Figures, Settings


def missed(judgements: Iterable[Judgement], figures: Mapping[str, float]) -> list[str]:
    """Where the figures lie that miss their bar: "kernels/32,7,7,512/forward", "mpi/2 ranks/C=64", "step"."""
    return sorted(
        {
            _section(name)
            for judgement in judgements
            if judgement.verdict is Verdict.MISSED
            for name in judgement.bar.figures
            if not _reaches(judgement.bar, figures, name)
        }
    )


def measured(
    missed_sections: Iterable[str], settings: Settings, measure: Callable[[str, Settings], Figures]
) -> Figures:
    """The figures of some places, anew.

    Args:
        missed_sections: see `missed`.
        settings: of the run.
        measure: a section, by name.
    """
    figures: Figures = {}
    parts = [section.split("/") for section in missed_sections]
    shapes = tuple(sorted({part[1] for part in parts if part[0] == "kernels"}))
    for section in sorted({part[0] for part in parts}):
        figures |= measure(section, replace(settings, shapes=shapes))
    return figures


def merged(bars: Iterable[Bar], first: Figures, second: Figures) -> Figures:
    """The first figures; those of the second measurement at each place where only it reaches a bar."""
    figures_after = dict(first)
    for bar in bars:
        for name in bar.figures:
            if not _reaches(bar, first, name) and _reaches(bar, second, name):
                figures_after |= {other: seen for other, seen in second.items() if _section(other) == _section(name)}
    return figures_after


def _section(name: str) -> str:
    """What is compared with each other: of kernels all contenders in one pass over one shape."""
    return "/".join(name.split("/")[:3]) if name.startswith("kernels/") else name.rpartition("/")[0]


def _reaches(bar: Bar, figures: Mapping[str, float], name: str) -> bool:
    seen = figures.get(name, math.nan)
    return math.isfinite(seen) and within(seen, bar.must, bar.at_least)
