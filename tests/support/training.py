"""Running `bnlayer train`, and comparing what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from support.processes import children

# 50 steps cross an end of an epoch; its batches have 36 or 37 rows, which do not divide by 2 and 3.
FIFTY_STEPS = ("--dtype=float64", "--steps=50", "--batch-size=37", "--hidden=24,10", "--seed=3")

COMMAND = (sys.executable, "-m", "bnworker.cli", "train")


@dataclass(frozen=True)
class Trained:
    """What a run left.

    Attributes:
        summary: of `--summary`.
        tensors: of `--save`.
        out, err: what it wrote.
    """

    summary: dict[str, Any]
    tensors: dict[str, NDArray[Any]]
    out: str
    err: str


def trained(folder: Path, *options: str, before: Sequence[str | Path] = (), code: int = 0) -> Trained:
    """Run `bnlayer train` to its end.

    Args:
        folder: for its files.
        options: of the command.
        before: what starts it, e.g. mpiexec and its options.
        code: the exit code that is expected.
    """
    summary, saved = folder / "out" / "summary.json", folder / "out" / "saved.safetensors"
    done = subprocess.run(
        [*before, *COMMAND, *options, "--summary", summary, "--save", saved],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")},
    )
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        return Trained({}, {}, done.stdout, done.stderr)
    return Trained(json.loads(summary.read_text(encoding="utf-8")), load_file(saved), done.stdout, done.stderr)


def stopped(folder: Path, number: signal.Signals, *options: str, rank: int | None = None) -> Trained:
    """Begin `bnlayer train` of a thousand epochs, and signal it once the second one is over.

    Args:
        folder: for its files: report, checkpoint and summary.
        number: the signal; the exit code must be that of Ctrl-C, or say that the run can be resumed.
        options: of the command.
        rank: who gets the signal; None: the process that was started.
    """
    files = (f"--report={folder}/report", f"--save={folder}/saved.safetensors", f"--summary={folder}/summary.json")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")}
    process = subprocess.Popen(
        [*COMMAND, "--epochs=1000", "--batch-size=300", "--hidden=8", *files, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    try:
        assert process.stdout is not None
        seen = [next(line for line in process.stdout if "epoch 2/1000" in line)]
        os.kill(process.pid if rank is None else pid_of_rank(process.pid, rank), number)
        out, err = process.communicate(timeout=80)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (130 if number == signal.SIGINT else 75), seen[0] + out + err
    return Trained({}, load_file(folder / "saved.safetensors"), out, err)


def pid_of_rank(launcher: int, rank: int) -> int:
    """The pid of one of its ranks."""
    wanted = f"BNLAYER_RANK={rank}".encode()
    (match,) = (pid for pid in children(launcher) if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return match


def same_result(one: Trained, other: Trained) -> None:
    """All weights, velocities and moving statistics agree within 1e-9; the versions are the same."""
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        if tensor.dtype == np.int64 or name.endswith("pivot"):
            continue  # the grids follow from data that agree to 1e-9 alone: they may differ where that decides
        np.testing.assert_allclose(other.tensors[name], tensor, rtol=0, atol=1e-9, err_msg=name)
    assert one.summary["moving_version"] == other.summary["moving_version"] == one.summary["steps"]
    assert one.summary["test_accuracy"] == other.summary["test_accuracy"]
    assert abs(one.summary["train_loss"] - other.summary["train_loss"]) < 1e-9
