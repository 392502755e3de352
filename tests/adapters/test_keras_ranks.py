"""The Keras adapter on 1 to 3 ranks, in every backend's own compiled steps and in `fit()`: one process's results."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from support.adapters import Ended, run

pytestmark = [pytest.mark.rpc, pytest.mark.timeout(480)]

PARTS = {
    1: ("plain", "trained", "bits", "fitted"),
    2: ("trained", "bits", "fitted", "raises", "skips"),
    3: ("trained", "bits", "fitted"),
}
SCRIPT = Path(__file__).with_name("keras_rank.py")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Jobs:
    """One job for each number of ranks, and what their ranks wrote."""

    backend: str
    folder: Path
    ended: dict[int, Ended]

    def ranks(self, part: str, world_size: int) -> list[Arrays]:
        """What the ranks of a job saw in a part."""
        assert self.ended[world_size].code == 0, self.ended[world_size].err
        return [dict(np.load(self.folder / f"{part}-{world_size}-{rank}.npz")) for rank in range(world_size)]

    def union(self, part: str, world_size: int) -> Arrays:
        """The same as one: outputs and input gradients end to end; all else must be equal on all ranks."""
        each = self.ranks(part, world_size)
        joined = {}
        for name, first in each[0].items():
            if name.rpartition("_")[2].startswith(("y", "dx")):
                joined[name] = np.concatenate([rank[name] for rank in each])
            else:
                assert all(np.array_equal(rank[name], first) for rank in each), f"{name}: the ranks differ"
                joined[name] = first
        return joined


@pytest.fixture(scope="module", params=["torch", "jax", "tensorflow"])
def jobs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All jobs of a backend, side by side."""
    folder = tmp_path_factory.mktemp(request.param)

    def job(world_size: int) -> Ended:
        launch = [sys.executable, "-m", "bnworker.cli", "launch", "-n", str(world_size), "--", sys.executable]
        environ = {"KERAS_BACKEND": request.param, "TF_CPP_MIN_LOG_LEVEL": "3"}
        return run([*launch, SCRIPT, folder, *PARTS[world_size]], environ=environ, limit_s=400)

    with ThreadPoolExecutor(len(PARTS)) as pool:
        ended = dict(zip(PARTS, pool.map(job, PARTS), strict=True))
    return Jobs(request.param, folder, ended)


def close(got: Arrays, expected: Arrays, wide: float) -> None:
    """Compare with |got − expected| / (1 + |expected|): 1e-5, in float64 `wide`."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        error = np.max(np.abs(got[name] - want) / (1 + np.abs(want)))
        assert error <= (wide if name.startswith("float64") else 1e-5), f"{name}: {error}"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_equals_keras_on_the_union(jobs: Jobs, world_size: int) -> None:
    """Twenty steps; Keras itself computes float64 in float32 but on TensorFlow."""
    wide = 1e-10 if jobs.backend == "tensorflow" else 1e-5
    close(jobs.union("trained", world_size), jobs.union("plain", 1), wide)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_can_not_be_seen(jobs: Jobs, world_size: int) -> None:
    """The layers' outputs, input gradients and moving statistics have the bits of one process."""
    expected, got = jobs.union("bits", 1), jobs.union("bits", world_size)
    assert got.keys() == expected.keys()
    assert [name for name in expected if got[name].tobytes() != expected[name].tobytes()] == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_fit_on_equal_shards(jobs: Jobs, world_size: int) -> None:
    """`fit()` of a converted model, with a mask, equals `fit()` of Keras's layers on all rows."""
    close(jobs.union("fitted", world_size), jobs.union("fitted", 1), 1e-5)


def test_a_rank_that_raises_is_named(jobs: Jobs) -> None:
    """In the error that the compiled step of the other rank raises."""
    other, raised = (str(rank["text"]) for rank in jobs.ranks("raises", 2))
    assert raised == "ValueError: a fault of its own"
    assert "PeerLostError: rank 1 (" in other
    assert "failed with ValueError: a fault of its own" in other
    assert "layer 'raises_one' (forward, step 1)" in other


def test_a_skipped_layer_is_named(jobs: Jobs) -> None:
    """On both ranks: who waits where."""
    for rank in jobs.ranks("skips", 2):
        text = str(rank["text"])
        assert "StallError: The ranks wait for each other: rank 0 (" in text
        assert "waits in the enrolment of layer 'skips_two'" in text
        assert "waits in layer 'skips_one' (backward, step 0)" in text
