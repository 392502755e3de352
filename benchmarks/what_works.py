"""What works where: synchronized layers of each framework, ours beside theirs, in each case measured on two ranks.

    .venv-adapters/bin/python -m benchmarks.what_works [--only ROW...] [--json docs/images/what_works.json]
    .venv/bin/python -m benchmarks.what_works_picture

Two ranks on one machine, started as the framework's users start theirs, go through the cases. Results are compared
with the formula on the union of the rows (`what_works_cases.py`), and with the bits of the layer in one process of
NumPy. What a framework refuses is kept with the line of its error. Some minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import HERE, free_ports
from benchmarks.what_works_cases import CASES, CLOSE, Array, Case, deviation, of_one_process, truth

RESULT = Path("docs/images/what_works.json")
_LIMIT_S = 300.0
_AFTER_AN_ERROR_S = 20.0  # for the other rank's
_RANK, _RANKS = "benchmarks.what_works_rank", 2

Cell = dict[str, Any]
Command = tuple[list[str], dict[str, str]]  # of a process, and what its environment has more


@dataclass(frozen=True)
class Row:
    """A layer somewhere.

    Attributes:
        key: by which `what_works_rank` knows it.
        framework, device, layer: as they are shown.
        start: the processes of so many ranks.
        ours: whether it is this project's.
        unbiased: whether its moving variance is that of N − 1.
        device_needed: what is not on every machine.
    """

    key: str
    framework: str
    device: str
    layer: str
    start: Callable[[int], list[Command]]
    ours: bool = True
    unbiased: bool = False
    device_needed: str | None = None


def _torchrun(ranks: int) -> list[Command]:
    return [([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"], {})]


def _launch(ranks: int) -> list[Command]:
    return [([sys.executable, "-m", "bnworker.cli", "launch", "-n", str(ranks), "--", sys.executable, "-m"], {})]


def _side_by_side(ranks: int) -> list[Command]:
    (port,) = free_ports(1)
    return [
        ([sys.executable, "-m"], {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)})
        for rank in range(ranks)
    ]


def _workers(ranks: int) -> list[Command]:
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(ranks)]}
    tasks = [{"cluster": cluster, "task": {"type": "worker", "index": index}} for index in range(ranks)]
    return [([sys.executable, "-m"], {"TF_CONFIG": json.dumps(task)}) for task in tasks]


_CUDA = "torch.cuda.is_available() is False on this machine"
ROWS = (
    Row("torch", "torch, process group", "CPU", "SyncBatchNorm", _torchrun, unbiased=True),
    Row("torch, theirs", "torch, process group", "CPU", "torch.nn.SyncBatchNorm", _torchrun, ours=False, unbiased=True),
    Row(
        "torch, other devices", "torch, process group", "CPU, as other devices", "SyncBatchNorm",
        _torchrun, unbiased=True,
    ),
    Row("torch, CUDA", "torch, process group", "CUDA", "SyncBatchNorm", _torchrun, unbiased=True, device_needed=_CUDA),
    Row(
        "torch, CUDA, theirs", "torch, process group", "CUDA", "torch.nn.SyncBatchNorm", _torchrun, ours=False,
        unbiased=True, device_needed=_CUDA,
    ),
    Row("keras torch", "Keras on torch", "CPU", "BatchNormalization", _launch),
    Row("keras torch, theirs", "Keras on torch", "CPU", "keras.layers.BatchNormalization", _side_by_side, ours=False),
    Row("keras jax", "Keras on JAX", "CPU", "BatchNormalization", _launch),
    Row("keras jax, theirs", "Keras on JAX", "CPU", "keras.layers.BatchNormalization", _side_by_side, ours=False),
    Row("keras tensorflow", "Keras on TensorFlow", "CPU", "BatchNormalization", _launch),
    Row(
        "keras tensorflow, theirs", "Keras on TensorFlow", "CPU",
        "keras.layers.BatchNormalization, MultiWorkerMirroredStrategy", _workers, ours=False,
    ),
    Row("flax", "JAX, Flax NNX", "CPU", "SyncBatchNorm", _launch),
    Row("flax, theirs", "JAX, Flax NNX", "CPU", "flax.nnx.BatchNorm, axis_name", _side_by_side, ours=False),
    Row("numpy", "NumPy", "CPU", "BatchNormalization", _launch),
)  # fmt: skip


def measured(row: Row) -> dict[str, Cell]:
    """The cells of a row, by case."""
    if row.device_needed is not None and not _has_cuda():
        return {name: {"verdict": "not measured", "error": row.device_needed} for name in CASES}
    cells: dict[str, Cell] = {}
    while len(cells) < len(CASES):
        left = [name for name in CASES if name not in cells]
        outcomes = _job(row, left)
        # What comes after a failure is what the framework makes of it, if it was told; else it is started anew.
        began = [name for name in left if not all(_left_nothing(each) for each in outcomes[name])] or left[:1]
        for name in began:
            cells[name] = _verdict(row, CASES[name], outcomes[name])
            print(f"{row.key:28} {name:12} {_line(cells[name])}", flush=True)
    return cells


def _job(row: Row, names: list[str]) -> dict[str, list[Any]]:
    """What each rank saw in each case: arrays by name, or the line of an error."""
    with tempfile.TemporaryDirectory() as folder:
        ending = _ended(row.start(_RANKS), [_RANK, folder, row.key, *names], Path(folder))
        return {name: [_outcome(Path(folder, f"{name}-{rank}"), ending) for rank in range(_RANKS)] for name in names}


def _ended(commands: Sequence[Command], arguments: list[str], folder: Path) -> Failed:
    """Run the processes to their end, or to the limit; what to say where one left nothing behind."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("BNLAYER_", "TORCHELASTIC_"))}
    started = []
    with (folder / "log").open("wb") as log:
        for command, environment in commands:
            started.append(
                subprocess.Popen(
                    [*command, *arguments],
                    cwd=HERE,
                    env={**inherited, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
    deadline, alone_since = time.monotonic() + _LIMIT_S, None
    try:
        while any(process.poll() is None for process in started) and time.monotonic() < deadline:
            alone_since = (alone_since or time.monotonic()) if _waits(folder) else None
            if alone_since is not None and time.monotonic() > alone_since + _AFTER_AN_ERROR_S:
                break
            time.sleep(0.1)
        if any(process.poll() is None for process in started):
            return Failed(f"still waiting after {_LIMIT_S:g} s", hangs=True)
        codes = ", ".join(str(process.returncode) for process in started)
        tail = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return Failed(f"ended with {codes}: {' '.join(tail)}")
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _waits(folder: Path) -> bool:
    """Whether a rank has failed in a case, and another has not come out of it."""
    failed = {path.stem.rpartition("-")[0] for path in folder.glob("*.error")}
    return any(
        len([*folder.glob(f"{name}-[0-9].error"), *folder.glob(f"{name}-[0-9].npz")]) < _RANKS for name in failed
    )


@dataclass(frozen=True)
class Failed:
    """What a rank has to say instead of results.

    Attributes:
        text: its error, or how the job ended where it left nothing.
        at: when it was written; infinite for nothing.
        hangs: it had to be ended.
    """

    text: str
    at: float = float("inf")
    hangs: bool = False


def _outcome(at: Path, ending: Failed) -> dict[str, Array] | Failed:
    error, arrays = at.with_suffix(".error"), at.with_suffix(".npz")
    if error.exists():
        return Failed(error.read_text(encoding="utf-8"), error.stat().st_mtime)
    return dict(np.load(arrays)) if arrays.exists() else ending


def _left_nothing(outcome: Any) -> bool:
    return isinstance(outcome, Failed) and outcome.at == float("inf")


def _verdict(row: Row, case: Case, outcomes: list[Any]) -> Cell:
    failed = [each for each in outcomes if isinstance(each, Failed)]
    if failed:
        first = min(failed, key=lambda each: each.at)  # the others were told of it, or had to be ended
        return {"verdict": "hangs" if first.hangs else "refused", "error": _one_line(first.text)}
    union = {
        name: np.concatenate([rank[name] for rank in outcomes]) if name[0] in "yd" else outcomes[0][name]
        for name in outcomes[0]
    }
    want = truth(case, row.unbiased)
    off = {name: max(deviation(rank[name], want[name]) for rank in outcomes) for name in want if name[0] == "m"}
    for kind in ("y", "dx"):
        off[kind] = max(deviation(union[name], want[name]) for name in want if name.split()[0] == kind)
    if max(off.values()) > CLOSE:
        return {"verdict": "wrong", "deviation": off}
    alone = of_one_process(case, row.unbiased)
    same = all(union[name].tobytes() == value.tobytes() for name, value in alone.items())
    same = same and all(
        rank[name].tobytes() == alone[name].tobytes() for rank in outcomes for name in off if name in alone
    )
    return {"verdict": "exact" if same else "right", "deviation": off}


def _one_line(text: str) -> str:
    """The line that tells: frameworks put theirs among others. Addresses and paths are of one run."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300]


def _line(cell: Cell) -> str:
    if "deviation" in cell:
        return f"{cell['verdict']}, off by {max(cell['deviation'].values()):.1e}"
    return f"{cell['verdict']}: {cell['error']}"


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=[row.key for row in ROWS], metavar="ROW", help="keep the others")
    options = parser.parse_args()
    before = json.loads(options.json.read_text(encoding="utf-8"))["rows"] if options.only else []
    kept = {row["key"]: row for row in before}
    rows = []
    for row in ROWS:
        if options.only and row.key not in options.only:
            rows.append(kept[row.key])
            continue
        shown = {"key": row.key, "framework": row.framework, "device": row.device, "layer": row.layer, "ours": row.ours}
        rows.append({**shown, "cells": measured(row)})
    names = ("torch", "keras", "tensorflow-cpu", "jax", "flax", "numpy")
    document = {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "python": sys.version.split()[0],
        "cases": {name: case.title for name, case in CASES.items()},
        "rows": rows,
    }
    options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{options.json} written")


if __name__ == "__main__":
    main()
