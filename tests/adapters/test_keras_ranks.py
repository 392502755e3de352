"""The Keras adapter on 1 to 3 ranks, in every backend's own compiled steps and in `fit()`: one process's results."""

from pathlib import Path

import pytest

from support.framework_jobs import Jobs, assert_close, differing

pytestmark = [pytest.mark.rpc, pytest.mark.timeout(900)]

BACKENDS = ("torch", "jax", "tensorflow")
PARTS = {
    1: ("plain", "trained", "bits", "fitted"),
    2: ("trained", "bits", "fitted", "raises", "skips"),
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
