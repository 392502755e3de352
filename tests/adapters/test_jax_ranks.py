"""`sync_batch_norm` on 1 to 3 ranks, in compiled programs: the textbook's results, and one process's bits."""

from pathlib import Path

import pytest

from support.framework_jobs import Jobs, assert_close, differing

pytestmark = [pytest.mark.rpc, pytest.mark.timeout(480)]

PARTS = {1: ("plain", "trained", "bits"), 2: ("trained", "bits", "raises", "skips"), 3: ("trained", "bits")}
SCRIPT = Path(__file__).with_name("jax_rank.py")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All of them."""
    return Jobs.run(SCRIPT, tmp_path_factory.mktemp("jax"), PARTS)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_equals_the_textbook_on_the_union(jobs: Jobs, world_size: int) -> None:
    """Twenty steps of two parallel branches and one layer used twice; the formula differentiated by JAX."""
    assert_close(jobs.union("trained", world_size), jobs.union("plain", 1), 1e-10)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_do_not_change_the_result(jobs: Jobs, world_size: int) -> None:
    """Outputs, input gradients and moving statistics have the bits of one process, in every dtype, with a mask."""
    assert differing(jobs.union("bits", world_size), jobs.union("bits", 1)) == []


def test_a_rank_that_raises_is_named(jobs: Jobs) -> None:
    """In the error that the other rank's program raises."""
    other, raised = (str(rank["text"]) for rank in jobs.ranks("raises", 2))
    assert raised == "ValueError: a fault of its own"
    assert other.startswith("JaxRuntimeError")
    assert "PeerLostError: rank 1 (" in other
    assert "failed with ValueError: a fault of its own" in other
    assert "waits in layer 'raises_one' (forward, step 1)" in other


def test_a_skipped_layer_is_named(jobs: Jobs) -> None:
    """On both ranks: who waits where."""
    for rank in jobs.ranks("skips", 2):
        text = str(rank["text"])
        assert "StallError: The ranks wait for each other: rank 0 (" in text
        assert "waits in the enrolment of layer 'skips_two'" in text
        assert "waits in layer 'skips_one' (backward, step 0)" in text
