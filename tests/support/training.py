"""Running `bnlayer train`, and comparing what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

# 50 steps cross two ends of an epoch, whose last batches are smaller; 37 rows do not divide by 2 or 3.
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
