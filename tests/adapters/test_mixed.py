"""One job whose ranks are NumPy, torch, JAX and Keras at once: the bits of one process on the union."""

import sys
from pathlib import Path

import numpy as np
import pytest

from support.adapters import run

pytestmark = [pytest.mark.rpc, pytest.mark.timeout(480)]

SCRIPT = Path(__file__).with_name("mixed_rank.py")


def job(folder: Path, *frameworks: str) -> list[dict[str, np.ndarray]]:
    """Run a job with one rank of each framework; what the ranks saw."""
    folder.mkdir()
    launch = [sys.executable, "-m", "bnworker.cli", "launch", "-n", str(len(frameworks)), "--", sys.executable]
    ended = run([*launch, SCRIPT, folder, *frameworks], environ={"TF_CPP_MIN_LOG_LEVEL": "3"}, limit_s=400)
    assert ended.code == 0, ended.err
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(len(frameworks))]


def test_frameworks_can_not_be_seen(tmp_path: Path) -> None:
    """Outputs, input gradients and moving statistics over six steps of heavy-tailed rows; one rank has none."""
    (expected,) = job(tmp_path / "one", "numpy")
    ranks = job(tmp_path / "mixed", "numpy", "torch", "jax", "keras")
    for name, want in expected.items():
        if name.startswith(("y", "dx")):
            assert np.concatenate([rank[name] for rank in ranks]).tobytes() == want.tobytes(), name
        else:
            assert [rank[name].tobytes() == want.tobytes() for rank in ranks] == [True] * 4, name
