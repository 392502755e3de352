"""The Keras adapter on 1 to 3 ranks, in every backend's own compiled steps and in `fit()`: one process's results."""

import re
from pathlib import Path

import pytest

from support.contract.timing import FAILURE_WITHIN_S
from support.framework_jobs import Jobs, assert_close, differing

pytestmark = [pytest.mark.rpc, pytest.mark.timeout(900)]

BACKENDS = ("torch", "jax", "tensorflow")
PARTS = {
    1: ("plain", "trained", "bits", "fitted"),
    2: ("trained", "bits", "fitted", "raises", "skips", "fit_skips", "fit_raises"),
    3: ("trained", "bits", "fitted"),
}
SCRIPT = Path(__file__).with_name("keras_rank.py")


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Of Keras."""
    return str(request.param)


@pytest.fixture(scope="module")
def jobs(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All jobs of a backend."""
    return Jobs.run(SCRIPT, tmp_path_factory.mktemp(backend), PARTS, {"KERAS_BACKEND": backend})


@pytest.fixture(scope="module")
def over_mpi(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Two ranks under mpiexec, whose `fit()` fails."""
    folder = tmp_path_factory.mktemp(f"{backend}-mpi")
    return Jobs.run(SCRIPT, folder, {2: ("fit_skips", "fit_raises")}, {"KERAS_BACKEND": backend}, "mpi")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_equals_keras_on_the_union(jobs: Jobs, backend: str, world_size: int) -> None:
    """Twenty steps; Keras itself computes float64 in float32 but on TensorFlow."""
    wide = 1e-10 if backend == "tensorflow" else 1e-5
    assert_close(jobs.union("trained", world_size), jobs.union("plain", 1), wide)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_do_not_change_the_result(jobs: Jobs, world_size: int) -> None:
    """The layers' outputs, input gradients and moving statistics have the bits of one process, renorm's too."""
    assert differing(jobs.union("bits", world_size), jobs.union("bits", 1)) == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_fit_on_equal_shards(jobs: Jobs, world_size: int) -> None:
    """`fit()` of a converted model, with a mask, equals `fit()` of Keras's layers on all rows."""
    assert_close(jobs.union("fitted", world_size), jobs.union("fitted", 1), 1e-5)


def test_a_rank_that_raises_is_named(jobs: Jobs) -> None:
    """In the error that the compiled step of the other rank raises."""
    other, raised = (str(rank["text"]) for rank in jobs.ranks("raises", 2))
    assert raised == "ValueError: a fault of its own"
    assert "PeerLostError" in other
    assert "failed with ValueError: a fault of its own. rank 0 (" in other
    assert "waits in layer 'raises_one' (forward, step 1)" in other


def test_a_skipped_layer_is_named(jobs: Jobs) -> None:
    """On both ranks: who waits where."""
    for rank in jobs.ranks("skips", 2):
        text = str(rank["text"])
        assert "StallError" in text
        assert "waits in the enrolment of layer 'skips_two'; rank 1 (" in text
        assert "waits in layer 'skips_one' (backward, step 0)" in text


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("transport", ["jobs", "over_mpi"])
def test_a_callback_that_raises_is_named(transport: str, request: pytest.FixtureRequest) -> None:
    """In the error that the other rank's `fit()` raises, within a second."""
    other, raised = request.getfixturevalue(transport).ranks("fit_raises", 2)
    assert str(raised["text"]) == "ValueError: a fault of its own"
    text = str(other["text"])
    assert "PeerLostError" in text
    waits = r"rank 0 \(.*\) waits in layer 'fit_raises_(one|two)' \((forward|backward), step \d\)"
    assert re.search(r"rank 1 \(.*\) failed with ValueError: a fault of its own\. " + waits, text), text
    assert other["at"] - raised["at"] <= FAILURE_WITHIN_S


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("transport", ["jobs", "over_mpi"])
def test_a_layer_that_fit_skips_is_named(transport: str, request: pytest.FixtureRequest) -> None:
    """On both ranks: who waits where."""
    for rank in request.getfixturevalue(transport).ranks("fit_skips", 2):
        text = str(rank["text"])
        assert "StallError" in text
        assert "waits in the enrolment of layer 'fit_skips_two'" in text
        assert "waits in layer 'fit_skips_one' (backward, step 0)" in text
