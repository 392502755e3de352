"""What the layer costs, beside the memory's speed and beside its peers.

    python -m benchmarks [--full] [--only SECTION ...] [--shapes SHAPE ...] [--judge always] [--json FILE]

Prints tables and writes every figure to a JSON file. Exit status 1: a "must" bar is missed, or a section failed.
Bars are judged only if the machine was quiet when the run began; `--judge always` judges them anyway. What misses a bar
then is measured once more, at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import bars, peers, remeasure, report, steps_tensorflow
from benchmarks.machine import QUIET_BELOW, Machine
from benchmarks.sections import SECTIONS, Figures, Settings


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="everything; without it, what fits into three minutes")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--shapes", nargs="+", default=[], help="kernels: only these, e.g. 32,7,7,512")
    parser.add_argument("--judge", choices=["when-quiet", "always"], default="when-quiet")
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"), metavar="FILE")
    parser.add_argument(
        "--tensorflow-python", default=sys.executable, metavar="PATH", help="an interpreter that has TensorFlow"
    )
    return parser.parse_args(arguments)


def run(names: list[str], settings: Settings, console: Console) -> tuple[Figures, dict[str, float], list[str]]:
    """Run sections; their figures, the seconds each took, and those that failed."""
    figures: Figures = {}
    seconds: dict[str, float] = {}
    failed = []
    for name in names:
        start = time.perf_counter()
        try:
            figures |= SECTIONS[name](settings)
        except Exception:  # noqa: BLE001 - one section's failure must not hide the others' figures
            failed.append(name)
            console.print(f"[bold red]section {name} failed[/]")
            console.print(traceback.format_exc(), markup=False, highlight=False)
        seconds[name] = time.perf_counter() - start
    return figures, seconds, failed


def document(
    machine: Machine,
    settings: Settings,
    figures: Figures,
    seconds: dict[str, float],
    enforced: list[bars.Judgement],
    missed_sections: list[str],
) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "machine": machine.described(),
        "peers": dict(settings.peers),
        "full": settings.full,
        "seconds_by_section": seconds,
        "measured_again": missed_sections,
        "figures": figures,
        "bars": [
            {
                "name": j.bar.name,
                "must": j.bar.must,
                "aim": j.bar.aim,
                "at_least": j.bar.at_least,
                "seen": None if math.isnan(j.seen) else j.seen,
                "worst": j.worst,
                "verdict": j.verdict,
            }
            for j in enforced
        ],
    }


def main() -> int:
    """Run, print, write, judge."""
    options = parsed()
    console = Console(width=None if sys.stdout.isatty() else 160)
    machine = Machine.here()
    peers.one_thread()
    settings = Settings(
        full=options.full,
        peers={**peers.installed(), "tensorflow": steps_tensorflow.version(options.tensorflow_python)},
        tensorflow_python=options.tensorflow_python,
        shapes=tuple(options.shapes),
        report=lambda what: console.print(f"[dim]… {what}[/]"),
    )
    names = options.only or list(SECTIONS)
    enforced = machine.quiet or options.judge == "always"
    console.print(f"{machine.processor}, {machine.cores} cores, {machine.caches}; {machine.system}")
    console.print(f"Python {machine.python}, {_versions(machine.versions, 'without')}")
    console.print(f"peers: {_versions(settings.peers, 'NOT INSTALLED:')}")
    _flag(console, machine, enforced)
    figures, seconds, failed = run(names, settings, console)
    table = bars.narrowed(bars.BARS, settings.shapes) if settings.shapes else bars.BARS
    judgements = bars.compare(table, figures, ran=names, missing=settings.missing)
    missed_sections = remeasure.missed(judgements, figures) if enforced and not failed else []
    if missed_sections:
        console.print(f"[bold]a bar is missed; measured once more: {', '.join(missed_sections)}[/]")
        second = remeasure.measured(missed_sections, settings, lambda name, narrowed: run([name], narrowed, console)[0])
        figures = remeasure.merged(table, figures, second)
        judgements = bars.compare(table, figures, ran=names, missing=settings.missing)
    if "kernels" in names:
        console.print(report.kernel_table(figures))
    others = [name for name in names if name != "kernels"]
    if others:
        console.print(report.figure_table(figures, others))
    shown = [j for j in judgements if j.verdict is not bars.Verdict.NOT_RUN]
    console.print(report.bar_table(shown, enforced=enforced))
    _flag(console, machine, enforced)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        document(machine, settings, figures, seconds, judgements, missed_sections), indent=1, ensure_ascii=False
    )
    options.json.write_text(text + "\n", encoding="utf-8")
    took = ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items())
    console.print(f"{options.json} written; {took}")
    if failed:
        console.print(f"[bold red]failed: {', '.join(failed)}[/]")
        return 1
    return bars.exit_code(judgements, enforced=enforced)


def _versions(versions: Mapping[str, str | None], without: str) -> str:
    return ", ".join(f"{name} {version}" if version else f"{without} {name}" for name, version in versions.items())


def _flag(console: Console, machine: Machine, enforced: bool) -> None:
    if not machine.quiet:
        verdict = "judged all the same" if enforced else "not judged"
        console.print(
            f"[bold white on red] NOT QUIET [/] load average {machine.load[0]:.2f} at the start, above {QUIET_BELOW}: "
            f"times are unreliable, bars are {verdict}."
        )


if __name__ == "__main__":
    sys.exit(main())
