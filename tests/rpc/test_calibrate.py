"""`bnlayer calibrate`, as its user runs it: real ranks, over the service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bnworker.train.checkpoint import Checkpoint, read

pytestmark = pytest.mark.rpc


def bnlayer(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [sys.executable, "-m", "bnworker.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def checkpoint(path: Path) -> Checkpoint:
    """What is in a file."""
    content = read(path)
    assert content is not None
    return content


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run cut off early: its moving statistics still hold much of where they began."""
    path = tmp_path_factory.mktemp("calibrate") / "run.safetensors"
    done = bnlayer("train", "--steps", 15, "--transport", "none", "--save", path)
    assert done.returncode == 0, done.stderr
    return path


def test_any_number_of_workers_writes_the_same_statistics(trained: Path, tmp_path: Path) -> None:
    """All weights stay, the model does better, and two workers find what one does.

    Up to the rounding of a matrix product, which depends on how many rows a rank multiplies at once: of equal inputs
    the statistics are the same bits (tests/unit/test_calibration.py).
    """
    files, shown = {}, ""
    for workers in (1, 2):
        out = tmp_path / f"{workers}.safetensors"
        done = bnlayer("calibrate", trained, out, "--workers", workers)
        assert done.returncode == 0, done.stderr
        shown = done.stdout
        assert "statistics of 1,438 rows" in shown
        files[workers] = checkpoint(out)
    before = checkpoint(trained).tensors
    for name, tensor in files[1].tensors.items():
        if name.startswith("bn_1/state/moving"):
            assert tensor == pytest.approx(files[2].tensors[name], rel=1e-4, abs=1e-6)
            assert tensor.tobytes() != before[name].tobytes()
        elif "/state/" not in name:
            assert tensor.tobytes() == before[name].tobytes()
    accuracies = [line for line in shown.splitlines() if "test accuracy" in line]
    was, now = (float(word.rstrip("%")) for word in accuracies[0].replace("│", " ").split() if word.endswith("%"))
    assert now > was + 5


def test_bad_files_are_one_line_and_exit_code_2(trained: Path, tmp_path: Path) -> None:
    """No file, a foreign one, another ending, data that does not fit."""
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"not a checkpoint")
    out = tmp_path / "out.safetensors"
    for arguments, text in (
        ((tmp_path / "none.safetensors", out), "none.safetensors: there is no such file."),
        ((tmp_path / "none.safetensors", out, "--workers", 2), "none.safetensors: there is no such file."),
        ((foreign, out), "foreign.safetensors is no complete safetensors file"),
        ((trained, tmp_path / "out.txt"), "expected a name that ends in .safetensors"),
        ((trained, out, "--data", "nowhere.npz"), "nowhere.npz"),
        ((trained, out, "--workers", 2, "--transport", "none"), "--transport none is for one worker"),
    ):
        done = bnlayer("calibrate", *arguments)
        assert (done.returncode, text in done.stderr, done.stderr.count("\n")) == (2, True, 1), done.stderr
    assert not out.exists()


def test_any_number_of_workers_judges_the_same(trained: Path) -> None:
    """`bnlayer evaluate`: the counts are equal, the loss up to the rounding of a matrix product."""
    evaluations = {}
    for workers in (1, 2):
        done = bnlayer("evaluate", trained, "--split", "all", "--json", "--workers", workers)
        assert done.returncode == 0, done.stderr
        evaluations[workers] = json.loads(done.stdout)
        assert (evaluations[workers]["rows"], evaluations[workers]["world_size"]) == (1797, workers)
    for key in ("accuracy", "classes", "confusion"):
        assert evaluations[1][key] == evaluations[2][key]
    assert evaluations[1]["loss"] == pytest.approx(evaluations[2]["loss"], rel=1e-6)
