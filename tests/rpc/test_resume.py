"""Training through the service that is killed at any moment, and goes on: the bits of a run that nobody disturbed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from bnworker.train.checkpoint import Checkpoint, Origin, Progress, encode, read
from bnworker.train.settings import Settings
from support.disk import disk
from support.killing import KILLS, killed_and_resumed, undisturbed
from support.service import daemon
from support.training import COMMAND, FIFTY_STEPS, Trained, same_result, trained

pytestmark = [pytest.mark.rpc, pytest.mark.timeout(600)]


@pytest.mark.fault
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [3, pytest.param(KILLS, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_kills(kills: int, tmp_path: Path) -> None:
    """Of ranks and of the launcher, with -9: the final file's bytes are those of the undisturbed run."""
    parts, steps, story = killed_and_resumed(tmp_path, "service", kills, seed=kills)
    print("\n".join(story))
    assert parts == undisturbed(tmp_path, "service", steps)


@pytest.mark.fault
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [1, pytest.param(KILLS, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
def test_kills_of_the_whole_job(kills: int, tmp_path: Path) -> None:
    """Four ranks, launcher and service at once: weights, statistics and grids are those of the undisturbed run."""
    parts, steps, story = killed_and_resumed(tmp_path, "service", kills, seed=kills, ranks=4, whole_job=True)
    print("\n".join(story))
    assert parts == undisturbed(tmp_path, "service", steps, ranks=4)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Of two workers whom nobody disturbed."""
    return trained(tmp_path_factory.mktemp("whole"), "--workers=2", *FIFTY_STEPS)


def test_with_another_number_of_workers(fifty_steps_alone: Trained, tmp_path: Path) -> None:
    """Twenty steps with three, the rest with two: the result of a single process, to the rounding of its sums."""
    trained(tmp_path / "parts", "--workers=3", "--resume", *FIFTY_STEPS, "--steps=20")
    parts = trained(tmp_path / "parts", "--workers=2", "--resume", *FIFTY_STEPS)
    assert parts.summary["resumed_steps"] == 20
    assert parts.summary["world_size"] == 2
    same_result(fifty_steps_alone, parts)


def test_the_owner_gets_the_checkpoints_state(uninterrupted: Trained, tmp_path: Path) -> None:
    """Of a job whose service went on without the ranks: its newer statistics are replaced; the bits are the same."""
    with daemon() as address:
        job = ("--address", address, "--job=kept", "--workers=2", "--resume", *FIFTY_STEPS)
        trained(tmp_path / "parts", *job, "--steps=20")
        older = (tmp_path / "parts" / "out" / "saved.safetensors").read_bytes()
        trained(tmp_path / "parts", *job, "--steps=30")
        (tmp_path / "parts" / "out" / "saved.safetensors").write_bytes(older)
        parts = trained(tmp_path / "parts", *job)
    assert parts.summary["resumed_steps"] == 20
    for name, tensor in uninterrupted.tensors.items():
        assert parts.tensors[name].tobytes() == tensor.tobytes(), name


def test_a_new_run_in_an_old_job(uninterrupted: Trained, tmp_path: Path) -> None:
    """It begins with its own statistics, not with those that the job's last run left."""
    with daemon() as address:
        job = ("--address", address, "--job=kept", "--workers=2", *FIFTY_STEPS)
        trained(tmp_path / "first", *job, "--seed=9", "--steps=7")
        repeated = trained(tmp_path / "again", *job)
    for name, tensor in uninterrupted.tensors.items():
        assert repeated.tensors[name].tobytes() == tensor.tobytes(), name


def test_a_full_disk(tmp_path: Path) -> None:
    """One clear line, exit code 1; the file is the checkpoint of before, and it can be gone on from."""
    with disk(tmp_path / "disk", "mount") as tiny:
        path = tiny.folder / "run.safetensors"
        train = (*COMMAND, "--hidden=256", "--epochs=4", "--save", path, "--save-every=3", "--resume")
        subprocess.run([*train, "--transport=none", "--steps=3"], capture_output=True, timeout=200, check=True)
        before = path.read_bytes()
        # There is room for one checkpoint, not for a second beside it.
        command = tiny.command(len(before) - 1, *train, "--workers=2")
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 1, done.stderr
        assert (
            f"bnlayer: train: --save {path}: step 6 could not be saved: {tiny.error}. The file is as it was before.\n"
        ) in done.stderr
        assert "Traceback" not in done.stderr
        assert tiny.files == ["run.safetensors"]
        assert path.read_bytes() == before
        kept = read(path)
        assert kept is not None
        assert kept.progress.steps == 3


def test_what_all_ranks_find_is_said_once(tmp_path: Path) -> None:
    """Under mpiexec, srun or our launch there is no launcher that looks first: other data, one line, exit code 2."""
    path = tmp_path / "run.safetensors"
    train = (sys.executable, "-m", "bnworker.cli", "train", "--hidden=4", "--steps=2", f"--save={path}")
    launch = (sys.executable, "-m", "bnworker.cli", "launch", "-n", "2", "--")
    subprocess.run([*train, "--transport=none"], capture_output=True, timeout=200, check=True)
    other = tmp_path / "other.npz"
    np.savez(other, x=np.eye(30, 64), y=np.arange(30) % 10)
    done = subprocess.run(
        [*launch, *train, "--resume", f"--data={other}"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("belongs to a run on other data: it was digits (") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.fault
def test_a_process_killed_while_saving_leaves_a_complete_file(tmp_path: Path) -> None:
    """A process that saves without pause, killed 8 times: what is there decodes, and is never older than before."""
    code = (
        "import sys; from pathlib import Path; import numpy as np; from dataclasses import replace\n"
        "from bnworker.train.checkpoint import decode, encode, read\n"
        "from bnworker.train.files import write_atomically\n"
        "path = Path(sys.argv[1]); base = read(path)\n"
        "while True:\n"
        "    base = replace(base, progress=replace(base.progress, steps=base.progress.steps + 1))\n"
        "    write_atomically(path, encode(base)); print(base.progress.steps, flush=True)\n"
    )
    path = tmp_path / "run.safetensors"
    tensors, progress = {"big": np.ones(200_000)}, Progress(0, (), loss_sum=0.0, correct=0, rows=0)
    path.write_bytes(encode(Checkpoint(tensors, progress, Settings().as_json(), Origin("digits", "ab" * 16, 64, 10))))
    delays = np.random.default_rng(20).uniform(0, 0.01, 8)
    for delay in delays:
        with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()
            threading.Event().wait(delay)  # where in its work it is hit
            child.kill()
            reported = child.stdout.read().split()
        checkpoint = read(path)
        assert checkpoint is not None
        assert checkpoint.progress.steps >= max(map(int, reported), default=0)
