"""Draw time ÷ limit by shape: this project's kernels, float kernels, torch and JAX.

python -m benchmarks.picture [--json out/bench.json] [--out docs/images/kernels.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

PASSES = {"forward": "read + copy", "backward": "read two + triad"}


@dataclass(frozen=True)
class Mark:
    """How a contender is drawn; Okabe and Ito's colours, which the colour-blind tell apart too."""

    label: str
    colour: str
    symbol: str
    size: float = 62


MARKS = {
    "reference": Mark("exact sums, NumPy", "#8C8C8C", "s", 44),
    "jax": Mark("JAX", "#CC79A7", "^"),
    "torch": Mark("torch", "#D55E00", "D", 46),
    "float": Mark("float sums, compiled", "#E69F00", "o"),
    "compiled": Mark("exact sums, compiled (the layer)", "#0072B2", "o", 92),
}
_TICKS = (1, 2, 5, 10, 20, 50, 100)


def drawn(document: Mapping[str, Any]) -> Figure:
    """The picture of one run."""
    figures: dict[str, float] = document["figures"]
    shapes = list(dict.fromkeys(name.split("/")[1] for name in figures if name.startswith("kernels/")))
    if not shapes:
        raise SystemExit("The file holds no figures of the kernels: run `make bench` first.")
    figure = Figure(figsize=(9.4, 4.6), dpi=160, layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    greatest = max(value for name, value in figures.items() if name.startswith("kernels/") and _drawn(name))
    for axes, which in zip(panels, PASSES, strict=True):
        _panel(axes, which, shapes, figures, greatest)
    panels[0].set_yticks(range(len(shapes)), [_row(shape, figures) for shape in shapes])
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    machine = document["machine"]
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items() if level != "L1")
    figure.suptitle(
        "A pass over the data: its time ÷ the memory's limit, one thread, float32\n"
        f"1× is what reading and writing the same arrays takes; logarithmic.  "
        f"{machine['processor']}, {caches}",
        x=0.01,
        ha="left",
        fontsize=9.5,
    )
    return figure


def _drawn(name: str) -> bool:
    _, _, which, *rest = name.split("/")
    return which in PASSES and rest[-1] == "limits"


def _panel(axes: Axes, which: str, shapes: list[str], figures: Mapping[str, float], greatest: float) -> None:
    axes.set_xscale("log")
    axes.axvline(1, color="#202020", linewidth=1.4)
    for name, mark in MARKS.items():
        points = [(figures.get(f"kernels/{shape}/{which}/{name}/limits"), row) for row, shape in enumerate(shapes)]
        seen = [(x, row) for x, row in points if x is not None]
        if seen:
            axes.scatter(
                [x for x, _ in seen],
                [row for _, row in seen],
                s=mark.size,
                color=mark.colour,
                marker=mark.symbol,
                label=mark.label,
                zorder=3,
                linewidths=0.8,
                edgecolors="white",
            )
        if name == "compiled":
            for x, row in seen:
                axes.annotate(
                    f"{x:.1f}",
                    (x, row),
                    (0, -13),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=mark.colour,
                )
    axes.set_title(f"{which}  (limit: {PASSES[which]})", loc="left", fontsize=10)
    axes.set_xlim(0.75, greatest * 1.25)
    axes.set_ylim(-0.6, len(shapes) - 0.4)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if tick <= greatest * 1.25]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.grid(axis="both", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)


def _row(shape: str, figures: Mapping[str, float]) -> str:
    limits = [figures[f"kernels/{shape}/{which}/limit/seconds"] * 1e3 for which in PASSES]
    return f"{shape.replace(',', '×')}\nlimits {limits[0]:.2f} and {limits[1]:.2f} ms"


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"), metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("docs/images/kernels.png"), metavar="FILE")
    options = parser.parse_args()
    document = json.loads(options.json.read_text(encoding="utf-8"))
    drawn(document).savefig(options.out, metadata={"Software": None})
    print(f"{options.out} drawn from {options.json}")


if __name__ == "__main__":
    main()
