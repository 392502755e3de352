"""`bnlayer train` through the service: what it learns, what it writes, what it sends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bnworker.statistics import Statistics
from bnworker.train.data import load
from bnworker.transports.alone import AloneTransport
from bnworker.world import World
from support.training import FIFTY_STEPS, Trained, same_result, trained

pytestmark = pytest.mark.rpc


@pytest.mark.slow
def test_two_workers_learn_the_digits(tmp_path: Path) -> None:
    """The main job, with its default settings: 97 % of the test rows."""
    run = trained(tmp_path, "--data", "digits", "--workers", "2")
    summary = run.summary
    assert summary["test_accuracy"] >= 0.97
    assert (summary["transport"], summary["world_size"]) == ("service", 2)
    assert (summary["epochs"], summary["steps"], summary["moving_version"]) == (20, 460, 460)
    assert [(layer["name"], layer["channels"]) for layer in summary["layers"]] == [("bn_1", 128), ("bn_2", 64)]
    for layer in summary["layers"]:
        for name in ("moving_mean", "moving_variance"):
            assert np.float32(layer[name]).tobytes() == run.tensors[f"{layer['name']}/state/{name}"].tobytes()
    assert re.search(r"^epoch 20/20  loss 0\.\d{4}  accuracy 9[789]\.\d\d%  [\d,]+ rows/s$", run.out, re.MULTILINE)
    assert "2 (service)" in run.out


def test_the_number_of_workers_does_not_matter(fifty_steps_alone: Trained, tmp_path: Path) -> None:
    """Fifty float64 steps through the service, against one process on the same global batches."""
    assert fifty_steps_alone.summary["transport"] == "alone"
    together = trained(tmp_path, "--workers=3", *FIFTY_STEPS)
    assert (together.summary["transport"], together.summary["world_size"]) == ("service", 3)
    same_result(fifty_steps_alone, together)


def test_more_workers_than_rows(tmp_path: Path) -> None:
    """A rank without rows takes part in every exchange, and changes nothing."""
    options = ("--dtype=float64", "--steps=12", "--batch-size=2", "--hidden=6")
    alone = trained(tmp_path / "alone", "--transport=none", *options)
    same_result(alone, trained(tmp_path / "together", "--workers=3", *options))


def test_without_synchronization_the_result_is_another(fifty_steps_alone: Trained, tmp_path: Path) -> None:
    """Unsynchronized replicas do differ: the tests above see the exchange, not an accident."""
    alone = fifty_steps_alone
    replicas = trained(tmp_path, "--transport=none", "--workers=2", *FIFTY_STEPS)
    assert (replicas.summary["transport"], replicas.summary["replicas"]) == ("alone", 2)
    assert np.abs(alone.tensors["bn_1/state/moving_mean"] - replicas.tensors["bn_1/state/moving_mean"]).max() > 1e-4
    assert "one of 2 unsynchronized replicas" in replicas.out


def test_one_worker_goes_the_same_way(tmp_path: Path) -> None:
    """By default through a service as well: nothing is special about one."""
    run = trained(tmp_path, "--steps=3", "--hidden=4")
    assert (run.summary["transport"], run.summary["world_size"]) == ("service", 1)


STEPS = 250  # ten epochs and a part of one


@pytest.mark.slow
def test_what_is_exchanged(tmp_path: Path) -> None:
    """One exchange per layer and direction, but for a few probes; its bytes follow from channels, not from rows."""
    run = trained(tmp_path, "--workers=2", "--epochs=30", f"--steps={STEPS}", "--hidden=32,16")
    counts = run.summary["exchanges"]
    for layer in ("bn_1", "bn_2"):
        assert counts[f"{layer} enroll"] == 1
        for direction, probes in (("forward", 2), ("backward", 6)):
            probed = counts[f"{layer} {direction} probe"]
            assert 1 <= probed <= probes, (layer, direction)
            # The first probe comes before the first sums; each later one between two sums of one exchange.
            assert counts[f"{layer} {direction} sums"] == STEPS + probed - 1
    loading = _loading()
    assert counts["broadcast"] == 1
    assert counts["allreduce"] == STEPS + run.summary["epochs"] + sum(loading.exchanges.values())
    assert len(counts) == 2 * 5 + 2
    assert run.summary["bytes_sent"] == _bytes(counts, run.summary["epochs"]) + loading.bytes_sent


def _loading() -> Statistics:
    """What ranks agree on before the first step: it is about shards, of which there is one, whatever the ranks."""
    world = World(AloneTransport(), install=False)
    load("digits", world=world)
    return world.statistics


def _bytes(counts: dict[str, int], epochs: int) -> int:
    """What rank 0 sends of a float32 model 64 → 32 → 16 → 10. Rows do not occur here."""
    dense = 4 * (64 * 32 + 32 * 16 + 16 * 10 + 10)
    # The broadcast; the steps, with four sums; the evaluations, with five sums and what each rank waited.
    total = (dense + 4 * 2 * (32 + 16)) + STEPS * (dense + 32) + epochs * 8 * (5 + 2)
    for layer, channels in (("bn_1", 32), ("bn_2", 16)):
        total += channels * (2 * 4 + 4 * 8) + 3 * 8  # enrolment: moving statistics, grids, flags
        for direction in ("forward", "backward"):
            total += channels * 8 * 2 * counts[f"{layer} {direction} probe"]
            total += channels * 8 * 6 * counts[f"{layer} {direction} sums"]
    return total


# Every pull compares what the layer has by itself with what the owner has, before it takes it over.
MIRROR = """
import bnworker
from bnworker.train.data import load
from bnworker.train.settings import Settings
from bnworker.train.loop import train

compared = dict.fromkeys(("float32", "float64"), 0)

class Comparing(bnworker.World):
    def pull(self, layer):
        if not isinstance(layer, str) and layer.state.version:
            own, owners = layer.state.arrays(), super().pull(layer.name).arrays()
            for name in own:
                assert own[name].dtype == owners[name].dtype
                assert own[name].tobytes() == owners[name].tobytes(), (layer.name, name)
            compared[dtype] += 1
        return super().pull(layer)

for dtype in compared:
    with bnworker.join(job=dtype) as world:
        world.__class__ = Comparing
        train(Settings(epochs=3, hidden=(12, 7), dtype=dtype, steps=40), load("digits", dtype, world=world), world)
print(world.rank, *compared.values())
"""


def test_every_rank_has_the_owners_statistics() -> None:
    """Bit for bit, without having pulled them: ranks apply the same function to the same bytes."""
    command = [sys.executable, "-m", "bnworker.cli", "launch", "-n", "3", "--", sys.executable, "-c", MIRROR]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "[0] 0 4 4", "[1] 1 4 4", "[2] 2 4 4"]
