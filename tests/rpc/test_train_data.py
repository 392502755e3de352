"""`bnlayer train` on one's own files: the same result for any number of workers, and one line for bad data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from subprocess import run

import numpy as np
import pytest

from support.datasets import rows, write
from support.processes import launch
from support.training import COMMAND, same_result, trained

pytestmark = pytest.mark.rpc

OPTIONS = ("--dtype=float64", "--steps=20", "--batch-size=16", "--hidden=6", "--learning-rate=0.01")


def test_shards_and_any_number_of_workers(tmp_path: Path) -> None:
    """Three shards of unlike sizes: fewer workers than shards, and more."""
    data = f"--data={write(tmp_path / 'shards', [70, 9, 41])}"
    alone = trained(tmp_path / "alone", data, "--transport=none", *OPTIONS)
    for workers in (2, 5):
        together = trained(tmp_path / f"{workers}", data, f"--workers={workers}", *OPTIONS)
        assert together.summary["world_size"] == workers
        same_result(alone, together)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    """Given x and y and nothing else, it trains, and says how good it is on rows that it set aside."""
    x, y = rows(300)
    x[:, 0] = 4 * (y == 0)
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    run = trained(tmp_path, f"--data={tmp_path / 'mine.npz'}", "--workers=2", "--epochs=5", "--batch-size=32")
    assert run.summary["test_accuracy"] > 0.9


# Each rank says which files below the folder it opened.
OPENED = """
import json
import bnworker
from bnworker.train.data import load
opened = set()
sys.addaudithook(lambda event, what: opened.add(os.path.basename(str(what[0]))) if event == "open" else None)
with bnworker.join() as world:
    data = load(FOLDER, world=world)
    assert all(batch.problem is None for batch in data.batches(16, 0, 1))
    assert all(batch.problem is None for batch in data.test())
print(json.dumps(sorted(name for name in opened if name.endswith(".npz"))), flush=True)
"""


def test_a_rank_opens_its_own_shards_alone(tmp_path: Path) -> None:
    """As the operating system sees it."""
    folder = write(tmp_path / "shards", [20, 20, 20])
    code = "import os, sys\n" + OPENED.replace("FOLDER", repr(str(folder)))
    done = launch(2, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ['[0] ["0.npz"]', '[1] ["1.npz", "2.npz"]']


def reported(folder: Path, workers: int, *options: str) -> str:
    """What the command writes on stderr about bad data; its exit code is 2, and no rank reports another one lost."""
    done = run(
        [*COMMAND, f"--data={folder}", f"--workers={workers}", *OPTIONS, *options],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")},
    )
    assert done.returncode == 2, done.stdout + done.stderr
    # A machine that is busy with other things may make the service warn of a slow rank.
    lines = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("[service] ")]
    assert all(line.startswith("bnlayer: train: ") for line in lines), done.stderr
    return "".join(lines)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_bad_label(workers: int, tmp_path: Path) -> None:
    """Said once, with file and row, by the process that would have started ranks."""
    folder = write(tmp_path / "shards", [20, 20, 20])
    x, y = rows(20)
    y[13] = -1
    np.savez(folder / "2.npz", x=x, y=y)
    line = f"bnlayer: train: {folder}/2.npz: row 13 of y: label -1; expected an integer from 0 to 65,535."
    assert reported(folder, workers) == f"{line}\n"


def test_a_bad_row_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Seen by the last rank alone, when it reads the row; all end together, with one line."""
    folder = write(tmp_path / "shards", [20, 20, 20])
    x, y = rows(20, 40)
    x[:, 2] = np.nan
    np.savez(folder / "2.npz", x=x, y=y)
    text = reported(folder, 3)
    assert text.count(f"bnlayer: train: {folder}/2.npz: row ") == 1
    assert text.count("feature 2 is nan; expected a finite number.") == 1


def test_a_missing_file_starts_nothing(tmp_path: Path) -> None:
    """It is said by the launcher, at once."""
    assert reported(tmp_path / "gone.npz", 3) == (
        f"bnlayer: train: --data {tmp_path}/gone.npz: cannot be read: No such file or directory.\n"
    )


# A rank cuts a shard short, or writes to it, between two steps.
CHANGING = """
import bnworker
from bnworker.train.data import DataError, load
from bnworker.train.events import Step
from bnworker.train.settings import Settings
from bnworker.train.loop import train
with bnworker.join() as world:
    data = load(FOLDER, world=world)
    def watch(event):
        if isinstance(event, Step) and event.number == 3 and world.rank == 0:
            CHANGE
    try:
        train(Settings(epochs=20, batch_size=8, hidden=(4,)), data, world, watch=watch)
    except DataError as error:
        text = str(error)
print(text.split(": it was")[0].replace(FOLDER, ""), flush=True)
"""


@pytest.mark.parametrize(
    "change", ["os.truncate(FOLDER + '/2.npz', 300)", "os.utime(FOLDER + '/2.npz')"], ids=["cut short", "written to"]
)
def test_a_shard_that_changes_during_training(change: str, tmp_path: Path) -> None:
    """No signal, no wrong rows: every rank raises the same error."""
    folder = write(tmp_path / "shards", [20, 20, 20])
    code = "import os, sys\n" + CHANGING.replace("CHANGE", change).replace("FOLDER", repr(str(folder)))
    done = launch(3, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    expected = "/2.npz: the file changed while the run used it"
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] {expected}" for rank in range(3)]
