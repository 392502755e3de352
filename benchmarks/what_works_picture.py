"""Draw what works where, and write its table, from what `what_works` measured.

python -m benchmarks.what_works_picture [--json docs/images/what_works.json] [--page docs/what-works.md]

The table of the page stands between `<!-- table -->` and `<!-- /table -->`.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from benchmarks.what_works import RESULT

Cell = Mapping[str, Any]

# Okabe and Ito's colours, which the colour-blind tell apart too; and the text on them.
COLOURS = {
    "exact": ("#0072B2", "white", "right, with the bits of one process"),
    "right": ("#56B4E9", "black", "right within 1e-5"),
    "wrong": ("#D55E00", "white", "wrong without an error: the largest deviation"),
    "refused": ("#E6E6E6", "black", "refused"),
    "hangs": ("#CC79A7", "black", "hangs"),
    "not measured": ("white", "#606060", "not measured"),
}
_CHARACTERS = 27  # in a line of a cell


def shown(cell: Cell) -> str:
    """A cell's text in the table and in the picture."""
    if "error" in cell:
        return f"{cell['verdict']}: {cell['error']}"
    far = max(cell["deviation"].values())
    return {"exact": "same bits", "right": "right", "wrong": f"wrong: {_number(far)}"}[cell["verdict"]]


def _number(far: float) -> str:
    return "not a number" if far == float("inf") else f"{far:.2g}"


def table(document: Mapping[str, Any]) -> str:
    """Every cell, in Markdown; ″ stands for an error as in the cell before."""
    titles = list(document["cases"].values())
    lines = [["", "device", *titles], ["---"] * (2 + len(titles))]
    for row in document["rows"]:
        layer = f"**{row['layer']}**" if row["ours"] else row["layer"]
        texts = [shown(cell).replace("|", "\\|") for cell in row["cells"].values()]
        said = ["″" if text == before and ":" in text else text for before, text in pairwise(["", *texts])]
        lines.append([f"{row['framework']}: {layer}", row["device"], *said])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def drawn(document: Mapping[str, Any]) -> Figure:
    """The picture: a row for each layer, a column for each case."""
    rows, titles = document["rows"], list(document["cases"].values())
    figure = Figure(figsize=(12.6, 0.46 * len(rows) + 1.5), dpi=130, layout="constrained", facecolor="white")
    axes: Axes = figure.subplots()
    axes.set_xlim(0, len(titles))
    axes.set_ylim(len(rows), 0)
    for at, row in enumerate(rows):
        _row(axes, at, list(row["cells"].values()))
    axes.set_xticks([column + 0.5 for column in range(len(titles))], titles, fontsize=9)
    axes.xaxis.tick_top()
    axes.set_yticks([at + 0.5 for at in range(len(rows))], [_label(row) for row in rows], fontsize=8)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["ours"] else "normal")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    seen = {cell["verdict"] for row in rows for cell in row["cells"].values()}
    patches = [
        Patch(facecolor=colour, edgecolor="#B0B0B0", label=text)
        for verdict, (colour, _, text) in COLOURS.items()
        if verdict in seen
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8.5)
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    figure.suptitle(
        "A synchronized layer on two ranks, three training steps: outputs, input gradients and moving statistics\n"
        f"compared with the formula on all rows. This project's in bold.  {versions}",
        x=0.01,
        ha="left",
        fontsize=9.5,
    )
    return figure


def _label(row: Mapping[str, Any]) -> str:
    layer = row["layer"].replace("keras.layers.", "").replace("torch.nn.", "nn.").replace("flax.", "")
    whose = "bnlayer" if row["ours"] else textwrap.fill(layer, 44)
    return f"{row['framework']}, {row['device']}\n{whose}" if row["ours"] else f"{whose} ({row['device']})"


def _row(axes: Axes, at: int, cells: list[Cell]) -> None:
    """Its cells; neighbours with the same error are one wide cell."""
    column = 0
    for text, group in groupby(cells, key=shown):
        same = list(group)
        wide = [same] if "error" in same[0] else [[cell] for cell in same]
        for part in wide:
            width = len(part)
            lines = textwrap.wrap(text, _CHARACTERS * width)
            most = 3 if width == 1 else 2
            shortened = "\n".join(lines[:most]) + (" …" if len(lines) > most else "")
            _cell(axes, at, column, width, part[0], shortened)
            column += width


def _cell(axes: Axes, at: int, column: int, width: int, cell: Cell, text: str) -> None:
    colour, ink, _ = COLOURS[cell["verdict"]]
    box = Rectangle(
        (column + 0.01, at + 0.04), width - 0.02, 0.92, facecolor=colour, edgecolor="#B0B0B0", linewidth=0.6
    )
    axes.add_patch(box)
    axes.text(column + width / 2, at + 0.5, text, ha="center", va="center", fontsize=7.5, color=ink)


def written(page: str, document: Mapping[str, Any]) -> str:
    """The page with its table replaced.

    Raises:
        ValueError: the page has no place for it.
    """
    begin, end = page.find("<!-- table -->\n"), page.find("<!-- /table -->")
    if min(begin, end) < 0:
        raise ValueError("The page has no <!-- table --> … <!-- /table -->.")
    return f"{page[:begin]}<!-- table -->\n\n{table(document)}\n\n{page[end:]}"


def main() -> None:
    """Draw it, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--out", type=Path, default=RESULT.with_suffix(".png"), metavar="FILE")
    parser.add_argument("--page", type=Path, default=Path("docs/what-works.md"), metavar="FILE")
    options = parser.parse_args()
    document = json.loads(options.json.read_text(encoding="utf-8"))
    drawn(document).savefig(options.out, metadata={"Software": None})
    options.page.write_text(written(options.page.read_text(encoding="utf-8"), document), encoding="utf-8")
    print(f"{options.out} and the table of {options.page} from {options.json}")


if __name__ == "__main__":
    main()
