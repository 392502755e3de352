"""One job whose ranks are NumPy, torch, JAX and Keras at once: the bits of one process on the union."""

from pathlib import Path

import numpy as np
import pytest

from support.framework_jobs import Arrays, launch

pytestmark = [pytest.mark.rpc, pytest.mark.timeout(480)]

SCRIPT = Path(__file__).with_name("mixed_rank.py")


def job(folder: Path, *frameworks: str) -> list[Arrays]:
    """Run a job with one rank of each framework; what the ranks saw."""
    folder.mkdir()
    ended = launch(len(frameworks), SCRIPT, folder, *frameworks, environ={})
    assert ended.code == 0, ended.err
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(len(frameworks))]


def test_frameworks_do_not_change_the_result(tmp_path: Path) -> None:
    """Outputs, input gradients and moving statistics over six steps of heavy-tailed rows; one rank has none."""
    (expected,) = job(tmp_path / "one", "numpy")
    ranks = job(tmp_path / "mixed", "numpy", "torch", "jax", "keras")
    for name, want in expected.items():
        if name.startswith(("y", "dx")):
            assert np.concatenate([rank[name] for rank in ranks]).tobytes() == want.tobytes(), name
        else:
            assert [rank[name].tobytes() == want.tobytes() for rank in ranks] == [True] * 4, name
