"""The figures as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from benchmarks.bars import Bar, Judgement, Verdict

_COLOURS = {
    Verdict.AIM: "green",
    Verdict.MUST: "yellow",
    Verdict.MISSED: "bold red",
    Verdict.NO_PEER: "dim",
    Verdict.NOT_RUN: "dim",
}
_PASSES = ("forward", "backward", "masked forward", "moments", "normalize", "gradient_sums", "input_gradient")
_CONTENDERS = ("compiled", "float", "reference", "torch", "jax")


def kernel_table(figures: Mapping[str, float]) -> Table:
    """Time ÷ limit, by shape and pass."""
    table = Table("shape", "pass", "limit, ms", *_CONTENDERS, "÷ float", "vs torch", title="time ÷ limit, one thread")
    for column in table.columns[2:]:
        column.justify = "right"
    shapes = dict.fromkeys(name.split("/")[1] for name in figures if name.startswith("kernels/"))
    for shape in shapes:
        for which in _PASSES:
            at = f"kernels/{shape}/{which}"
            limit = figures.get(f"{at}/limit/seconds")
            table.add_row(
                shape,
                which,
                _number(limit, 1e3, 3),
                *(_number(figures.get(f"{at}/{name}/limits")) for name in _CONTENDERS),
                _number(figures.get(f"{at}/compiled ÷ float")),
                _number(figures.get(f"{at}/compiled vs torch")),
                end_section=which == _PASSES[-1],
            )
    return table


def figure_table(figures: Mapping[str, float], sections: Sequence[str]) -> Table:
    """The other figures, one a line."""
    table = Table("figure", "value", title="the other figures")
    table.columns[1].justify = "right"
    for name, value in figures.items():
        if name.partition("/")[0] in sections:
            table.add_row(name, shown(name, value))
    return table


def shown(name: str, value: float) -> str:
    """A figure in the unit that its name tells: seconds, bytes, errors, or a ratio."""
    last = name.rpartition("/")[2]
    if "÷" in last or " vs " in last or last == "limits":
        return f"{value:.2f}x"
    if "accuracy" in name:
        return f"{value:.1e}"
    if last.endswith("bytes"):
        return f"{value / 2**20:.1f} MiB"
    return _duration(value)


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if abs(seconds) * scale >= 1:
            return f"{seconds * scale:.2f} {unit}"
    return f"{seconds * 1e6:.1f} µs"


def bar_table(judgements: Sequence[Judgement], *, enforced: bool) -> Table:
    """Every bar and what became of it."""
    title = "the bars" if enforced else "the bars, NOT JUDGED: the machine was not quiet"
    table = Table("bar", "must", "aim", "seen", "verdict", "worst at", title=title)
    for judgement in judgements:
        bar, colour = judgement.bar, _COLOURS[judgement.verdict]
        if not enforced and judgement.verdict is Verdict.MISSED:
            colour = "magenta"
        table.add_row(
            bar.name,
            bound(bar, bar.must),
            "" if bar.aim is None else bound(bar, bar.aim),
            "" if math.isnan(judgement.seen) else value(bar, judgement.seen),
            f"[{colour}]{judgement.verdict}[/]",
            judgement.worst,
        )
    return table


def bound(bar: Bar, number: float) -> str:
    """A bar's bound, in its unit."""
    return f"{'≥' if bar.at_least else '≤'} {value(bar, number)}"


def value(bar: Bar, number: float) -> str:
    """A figure in a bar's unit."""
    number *= bar.scale
    digits = f"{number:.1e}" if 0 < abs(number) < 1e-3 else f"{number:.3g}"
    return f"{digits}x" if bar.unit == "x" else f"{digits} {bar.unit}".rstrip()


def _number(number: float | None, scale: float = 1.0, digits: int = 2) -> str:
    return "–" if number is None else f"{number * scale:.{digits}f}"
