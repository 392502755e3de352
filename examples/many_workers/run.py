"""Why synchronize? Eight workers with four rows of unlike data each, compared with one process on all 32 rows.

    python examples/many_workers/run.py            # about two minutes on two cores

Three trainings of the same network on the same rows, step by step:

    one process      the 32 rows of a step as one batch
    synchronized     8 processes, 4 rows each, statistics of all 32
    plain            8 processes, 4 rows each, each with the statistics of its own; gradients still added

Writes `result.json` and `result.png`, and prints the numbers. Everything is seeded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

HERE = Path(__file__).parent
# Okabe and Ito's colours, which the colour-blind tell apart too.
ONE, SYNCHRONIZED, PLAIN = "#C4C4C4", "#0072B2", "#D55E00"


def trained(statistics: str, ranks: int, options: list[str]) -> dict[str, Any]:
    """Train in `ranks` processes, and return what the first one wrote."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        program = [sys.executable, str(HERE / "train.py"), statistics, *options, f"--result={result}"]
        launcher = [sys.executable, "-m", "bnworker.cli", "launch", "-n", str(ranks), "--"] if ranks > 1 else []
        # Threads of several processes for tiny matrices only fight for the cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, *program], env=environment, check=True)
        content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return content


def compared(workers: int, epochs: int, alike: bool) -> dict[str, Any]:
    """Train the three ways: the accuracies after every epoch, and how far synchronized is from one process."""
    options = [f"--workers={workers}", f"--epochs={epochs}", *(["--alike"] if alike else [])]
    one = trained("synchronized", 1, options)
    together = trained("synchronized", workers, options)
    plain = trained("plain", workers, options)
    apart = max(np.abs(np.subtract(a, b)).max() for a, b in zip(one["moving"], together["moving"], strict=True))
    return {
        "workers": workers,
        "rows_per_worker": 4,
        "data": "alike" if alike else "unlike",
        "test_accuracy": {
            "one process": one["own"],
            "synchronized": together["own"],
            "plain, statistics averaged": plain["averaged"],
            "plain, first worker's statistics": plain["own"],
        },
        "synchronized_equals_one_process_after_every_epoch": one["own"] == together["own"],
        "largest_difference_of_moving_statistics": float(apart),
    }


def picture(result: dict[str, Any], path: Path) -> None:
    """Draw the accuracies."""
    curves = result["test_accuracy"]
    epochs = np.arange(1, len(curves["synchronized"]) + 1)
    figure = Figure(figsize=(7.2, 3.6), dpi=144, layout="constrained")
    axes = figure.subplots()
    for name, colour, width, line in (
        ("one process", ONE, 6.0, "-"),
        ("synchronized", SYNCHRONIZED, 1.8, "-"),
        ("plain, statistics averaged", PLAIN, 1.8, "-"),
        ("plain, first worker's statistics", PLAIN, 1.2, "--"),
    ):
        label = f"{curves[name][-1]:.1%}  {name}"
        axes.plot(epochs, curves[name], color=colour, linewidth=width, linestyle=line, label=label)
    axes.set_title(
        f"{result['workers']} workers × {result['rows_per_worker']} rows of {result['data']} data in a step", loc="left"
    )
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy with moving statistics")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="#E6E6E6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", title="after the last epoch", alignment="left")
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alike", action="store_true", help="every worker holds rows of all classes, for comparison")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out/many_workers"), metavar="DIR")
    options = parser.parse_args()
    result = compared(options.workers, options.epochs, options.alike)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    picture(result, options.out / "result.png")
    print(
        f"test accuracy after {options.epochs} epochs, {result['workers']} workers of 4 rows of {result['data']} data:"
    )
    for name, curve in result["test_accuracy"].items():
        print(f"  {name:34} {curve[-1]:.1%}")
    same = result["synchronized_equals_one_process_after_every_epoch"]
    print(f"synchronized and one process: {'the same' if same else 'NOT the same'} after every epoch;")
    print(f"moving statistics differ by {result['largest_difference_of_moving_statistics']:.1e} at most")


if __name__ == "__main__":
    main()
