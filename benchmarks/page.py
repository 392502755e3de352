"""Write the tables of docs/performance.md anew, from a run's JSON.

    python -m benchmarks.page [--json out/bench.json] [--page docs/performance.md]

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; all other text of the page stays as it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.bars import BARS, Verdict
from benchmarks.kernels import PASSES, SHAPES
from benchmarks.report import bound, shown, value

Document = Mapping[str, Any]
_CONTENDERS = {
    "compiled": "this layer",
    "float": "float sums",
    "torch": "torch",
    "jax": "JAX",
    "reference": "reference",
}
_CHANNELS = (64, 256, 1024, 2048)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine(document: Document) -> str:
    """Where the figures are from."""
    here = document["machine"]
    caches = ", ".join(f"{level} {size}" for level, size in here["caches"].items())
    versions = {"Python": here["python"], **here["versions"], **document["peers"]}
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "bnlayer")
    absent = ", ".join(name for name, version in document["peers"].items() if not version)
    quiet = "quiet" if here["quiet"] else "**not quiet**: the times are unreliable"
    lines = [
        f"{here['processor']}, {here['cores']} cores, {caches}.",
        f"Load average {here['load'][0]:.2f} at the start, {quiet}.",
        f"{named}.",
    ]
    if absent:
        lines.append(f"Not installed: {absent}.")
    return "\n".join(lines)


def kernels(document: Document) -> str:
    """Time ÷ limit."""
    figures = document["figures"]
    rows = []
    for shape in map(str, SHAPES):
        for which in PASSES:
            at = f"kernels/{shape}/{which}"
            limit = figures.get(f"{at}/limit/seconds")
            ratios = (figures.get(f"{at}/{name}/limits") for name in _CONTENDERS)
            rows.append(
                [
                    shape.replace(",", "×"),
                    which,
                    "–" if limit is None else f"{limit * 1e3:.3f}",
                    *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                ]
            )
    return _table(["shape", "pass", "limit, ms", *_CONTENDERS.values()], rows)


def bars(document: Document) -> str:
    """Every bar with what was seen."""
    bars_by_name = {bar.name: bar for bar in BARS}
    rows = []
    for entry in document["bars"]:
        bar = bars_by_name[entry["name"]]
        seen = "–" if entry["seen"] is None else value(bar, entry["seen"])
        verdict = f"**{entry['verdict']}**" if entry["verdict"] == Verdict.MISSED else entry["verdict"]
        worst = entry["worst"].partition("/")[2] if len(bar.figures) > 1 else ""
        aim = "" if bar.aim is None else bound(bar, bar.aim)
        rows.append([bar.name, bound(bar, bar.must), aim, seen, verdict, worst])
    return _table(["bar", "must", "aim", "seen", "", "the worst at"], rows)


def exchanges(document: Document) -> str:
    """Seconds of an exchange, by ranks and channels."""
    figures = document["figures"]
    kinds = {
        "MPI, the layer's exchange": "mpi/{} ranks/C={}/exchange",
        "MPI, a bare Iallreduce": "mpi/{} ranks/C={}/bare",
        "service, the layer's exchange": "service/{} ranks/C={}/exchange",
        "service over gRPC alone": "service/{} ranks/C={}/stream",
        "raw Python sockets": "service/{} ranks/C={}/socket",
        "gloo all_reduce": "gloo/{} ranks/C={}/all_reduce",
    }
    rows = []
    for ranks in (2, 4, 8):
        for kind, pattern in kinds.items():
            row = [figures.get(pattern.format(ranks, channels)) for channels in _CHANNELS]
            if any(row):
                rows.append([kind, str(ranks), *("–" if f is None else shown(pattern, f) for f in row)])
    return _table(["exchange", "ranks", *(f"C = {channels}" for channels in _CHANNELS)], rows)


def layer_and_step(document: Document) -> str:
    """The layer as a whole, starting, and a step of ten layers."""
    figures = document["figures"]
    wanted = ("layer/32,64/", "starting/", "step/")
    rows = [[name, shown(name, seen)] for name, seen in figures.items() if name.startswith(wanted)]
    rows += [[name, shown(name, seen)] for name, seen in figures.items() if name.endswith("− kernels")]
    return _table(["figure", "seen"], rows)


TABLES: dict[str, Callable[[Document], str]] = {
    "machine": machine,
    "kernels": kernels,
    "bars": bars,
    "exchanges": exchanges,
    "whole": layer_and_step,
}


def written(text: str, document: Document) -> str:
    """The page with its tables replaced.

    Raises:
        ValueError: the page has no place for one of them.
    """
    for name, table in TABLES.items():
        begin, end = (text.find(mark) for mark in (f"<!-- {name} -->\n", f"<!-- /{name} -->"))
        if min(begin, end) < 0:
            raise ValueError(f"The page has no <!-- {name} --> … <!-- /{name} -->.")
        text = f"{text[:begin]}<!-- {name} -->\n\n{table(document)}\n\n{text[end:]}"
    return text


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"), metavar="FILE")
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"), metavar="FILE")
    options = parser.parse_args()
    document = json.loads(options.json.read_text(encoding="utf-8"))
    options.page.write_text(written(options.page.read_text(encoding="utf-8"), document), encoding="utf-8")
    print(f"{options.page}: tables written from {options.json}")


if __name__ == "__main__":
    main()
