"""What `bnlayer train` learns of its data before anything is started: the plan, labels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bnworker.train.data import load
from bnworker.train.forecast import forecast
from bnworker.train.loop import train
from bnworker.train.settings import Settings
from bnworker.transports.alone import AloneTransport
from bnworker.world import World
from support.command_line import SMALL_RUN, Command, squeezed
from support.datasets import rows, write


def test_the_plan_starts_nothing(command: Command) -> None:
    """Rows per rank, exchanges and bytes, computed from the channels."""
    code, out, err = command("train", "--workers=3", "--dry-run", "--hidden=32,16", "--save=run.safetensors")
    assert (code, err) == (0, "")
    plan = squeezed(out)
    assert "digits: nothing was started" in plan
    assert " training rows per rank 479, 479, 480 " in plan
    assert " exchanges per step 5 " in plan
    assert " bn_1 forward sums 1,536 bytes " in plan  # 6 words of 8 bytes for each of 32 channels
    assert " ranks 3 (service) " in plan
    assert " goes on from the beginning " in plan
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("text", "rows", "steps"),
    [
        ("", " 39 or 40 (spread); per rank, at most 14, 14, 14 ", " 720, 36 an epoch "),
        ("'keep'", " 41, the last of an epoch 3 (keep); per rank, at most 14, 14, 14 ", " 720, 36 an epoch "),
        (
            "'drop'",
            " 41; 3 rows are left out, other ones in each epoch (drop); per rank, at most 14, 14, 14 ",
            " 700, 35 an epoch ",
        ),
    ],
)
def test_the_plan_shows_the_sizes(text: str, rows: str, steps: str, command: Command) -> None:
    """Of the steps, for whatever becomes of the 3 rows that do not fill a batch of 41."""
    Path("run.toml").write_text(f"batch-size = 41\n{'last-batch = ' + text if text else ''}\n", encoding="utf-8")
    code, out, err = command("train", "--config=run.toml", "--workers=3", "--dry-run")
    assert (code, err) == (0, "")
    assert f" rows of a step{rows}" in squeezed(out)
    assert f" steps{steps}" in squeezed(out)


def test_ignored_entries_of_a_data_folder_are_named(command: Command) -> None:
    """By the plan and by the run: what lies beside the shards may have been meant as one."""
    folder = write(Path("shards"), [40, 40])
    (folder / "2.npz.gz").touch()
    (folder / "old").mkdir()
    code, out, _ = command("train", "--data=shards", "--dry-run")
    assert code == 0
    assert " not read 2.npz.gz, old (a folder) " in squeezed(out)
    reported = "bnlayer: train: --data shards: not read: 2.npz.gz, old (a folder)\n"
    assert command("train", "--data=shards", *SMALL_RUN)[::2] == (0, reported)
    (folder / "2.npz").symlink_to("gone.npz")
    line = "bnlayer: train: --data shards/2.npz: cannot be read: it is a link to gone.npz, which is not there.\n"
    assert command("train", "--data=shards", "--workers=2") == (2, "", line)


def test_labels_from_1_to_5(command: Command) -> None:
    """Are five classes: in the plan, the table, the summary, the checkpoint, and when exported; with --classes six."""
    rng = np.random.default_rng(0)
    np.savez("mine.npz", x=rng.standard_normal((50, 6)), y=np.arange(50) % 5 + 1)
    assert " 6 features, 5 classes with the labels 1 to 5 " in squeezed(
        command("train", "--data=mine.npz", "--dry-run")[1]
    )
    files = ("--summary=summary.json", "--save=run.safetensors")
    code, out, err = command("train", "--data=mine.npz", *SMALL_RUN, *files)
    assert (code, err) == (0, "")
    assert " labels 1 to 5 " in squeezed(out)
    assert json.loads(Path("summary.json").read_text(encoding="utf-8"))["labels"] == [1, 2, 3, 4, 5]
    code, out, _ = command("export", "run.safetensors", "weights.npz")
    assert (code, out) == (0, "outputs 0 to 4 stand for the labels 1 to 5\n")
    assert np.load("weights.npz")["dense_2/kernel"].shape == (8, 5)
    assert command("train", "--data=mine.npz", *SMALL_RUN, *files, "--resume")[0] == 0
    assert " 6 classes " in squeezed(command("train", "--data=mine.npz", "--dry-run", "--classes=6")[1])
    assert command("train", "--data=mine.npz", "--workers=2", "--classes=5") == (
        2,
        "",
        "bnlayer: train: mine.npz: row 4 of y: label 5; expected 0 to 4, the labels of the model.\n",
    )


@pytest.mark.parametrize("dry_run", ["--no-dry-run", "--dry-run"])
def test_bad_data_starts_nothing(dry_run: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that would start ranks looks through the data first; the plan does as well."""
    monkeypatch.setattr("bnworker.launcher.launch", lambda *_: pytest.fail("ranks were started"))
    folder = write(Path("shards"), [20, 20])
    x, y = rows(20)
    y[13] = -1
    np.savez_compressed(folder / "2.npz", x=x, y=y)
    line = "bnlayer: train: shards/2.npz: row 13 of y: label -1; expected an integer from 0 to 65,535.\n"
    assert command("train", "--data=shards", "--workers=2", dry_run) == (2, "", line)


def test_a_batch_that_is_never_full(command: Command) -> None:
    """Dropping it leaves nothing to train with; said before anything is started, by the plan too."""
    line = (
        "bnlayer: train: --last-batch drop: the 1,438 rows to train on are fewer than --batch-size 2,000, which leaves "
        "no step: expected spread or keep, or a smaller batch size.\n"
    )
    for options in (["--dry-run"], ["--workers=2"], ["--transport=none"]):
        assert command("train", "--batch-size=2000", "--last-batch=drop", *options) == (2, "", line)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_forecast_is_what_is_sent(dtype: str) -> None:
    """Bytes of a run in a world of one: its statistics count the same, but for the probes."""
    settings = Settings(epochs=2, batch_size=512, hidden=(6, 4), dtype=dtype)
    data, world = load("digits", dtype), World(AloneTransport())
    with world:
        train(settings, data, world)
    statistics = world.statistics
    plan = forecast(settings, data, workers=1)
    probes = sum(count for kind, count in statistics.exchanges.items() if kind[2] == "probe")
    assert plan.steps == 6
    exact = plan.start_bytes + plan.steps * plan.step_bytes + settings.epochs * plan.evaluation_bytes
    # Each layer and direction looks for its grid once, and rarely again, which also repeats the sums.
    repeated = statistics.bytes_sent - exact - plan.probe_bytes
    assert probes >= 4
    assert 0 <= repeated <= (probes - 4) * max(exchange.bytes for exchange in plan.exchanges) * 2
