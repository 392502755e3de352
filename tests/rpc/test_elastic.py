"""Elastic jobs: ranks are lost, others join, and the job ends with the bits of one that nobody disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from bnworker.train.checkpoint import read
from support.elastic import RANKS, planned, run
from support.killing import KILLS, killed_and_going_on
from support.processes import arguments, launch, script
from support.service import daemon
from support.training import COMMAND, pid_of_rank

pytestmark = pytest.mark.rpc


@pytest.mark.fault
@pytest.mark.parametrize("kills", [2, pytest.param(KILLS, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_ranks_are_killed(kills: int, tmp_path: Path) -> None:
    """With -9, anywhere in a step: the others go on, and with those that are started again make the very same sums."""
    plan, steps = planned(kills, seed=kills)
    alone = run(tmp_path / "alone", 1, f"1:{RANKS}", steps, [])
    parts = run(tmp_path / "parts", RANKS, f"2:{RANKS}", steps, plan, f"--max-restarts={kills}")
    print(f"from each kill to the next step: {', '.join(f'{gap:.2f}' for gap in parts.gaps)} s")
    assert parts.code == 0, parts.err
    assert len(parts.killed) == kills
    assert parts.digests == alone.digests
    assert parts.err.count("it is started again (restart ") == kills
    assert max(int(str(line["generation"])) for line in parts.lines if "generation" in line) > kills


@pytest.mark.fault
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [1, pytest.param(KILLS, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
def test_training_goes_on(kills: int, tmp_path: Path) -> None:
    """`train --elastic`, one rank of three killed after the other: as accurate as a run that nobody disturbed.

    A step that was cut short, and made again, has updated the moving statistics once.
    """
    undisturbed, disturbed, output = killed_and_going_on(tmp_path, kills, seed=kills)
    expected, accuracy = undisturbed["test_accuracy"], disturbed["test_accuracy"]
    print(f"accuracy {expected:.4f} undisturbed, {accuracy:.4f} after {kills} kills")
    for summary in (undisturbed, disturbed):
        assert {layer["moving_version"] for layer in summary["layers"]} == {summary["steps"]}
        assert summary["moving_version"] == summary["steps"]
    assert output.count("it is started again (restart ") == kills
    assert "resumed after step" in output
    assert abs(expected - accuracy) < 0.005


@pytest.mark.fault
def test_training_is_stopped_while_a_rank_is_missing(tmp_path: Path) -> None:
    """The others wait for it, and no step will follow: SIGTERM ends that, with the checkpoint and its exit code."""
    saved = tmp_path / "saved.safetensors"
    train = [*COMMAND, "--data=digits", "--batch-size=300", "--hidden=8", f"--save={saved}"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")}
    process = subprocess.Popen(
        [*train, "--epochs=1000", "--workers=3", "--elastic=3:3", "--max-restarts=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        assert next(line for line in process.stdout if "epoch 2/1000" in line)
        os.kill(pid_of_rank(process.pid, 0), signal.SIGKILL)  # which writes the checkpoints
        said = [next(line for line in process.stderr if "it is started again (restart 1 of 1" in line)]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, said[0] + out + err
    kept = read(saved)
    assert kept is not None
    steps = kept.progress.steps
    assert f"stopped after step {steps:,}, while the ranks formed the next generation; {saved} goes on from" in err, err
    resumed = subprocess.run(
        [*train, "--epochs=1000", f"--steps={steps + 3}", "--workers=2", "--resume"],
        env=environ, capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert f"resumed after step {steps:,}" in resumed.stdout


_KILLED_ONCE_SAVED = """\
from bnworker.cli import main, rank as command
write = command.write_atomically
def killed(*given):
    write(*given)
    if 'BNLAYER_RESTART_COUNT' not in os.environ: os.kill(os.getpid(), signal.SIGKILL)
command.write_atomically = killed
main()
"""


@pytest.mark.fault
def test_training_is_stopped_when_the_missing_rank_has_saved_it(tmp_path: Path) -> None:
    """Nobody has anything to write: the first of those that are left says all the same how to go on."""
    saved = tmp_path / "saved.safetensors"
    train = ("train", "--data=digits", "--hidden=8", f"--save={saved}", "--save-every=5", "--epochs=1000")
    command = arguments(3, *script(_KILLED_ONCE_SAVED), *train, options=("--elastic=3:3", "--max-restarts=1"))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environ)
    try:
        assert process.stderr is not None
        assert next(line for line in process.stderr if "it is started again (restart 1 of 1" in line)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    assert f"stopped after step 5, while the ranks formed the next generation; {saved} goes on from" in err, err
    kept = read(saved)
    assert kept is not None
    assert kept.progress.steps == 5


# ---- ranks join, and are missing ----

_LOOP = """\
import bnworker
state = bnworker.State(step=0)
for generation in bnworker.elastic(state):
    with generation as world:
        print('in', generation.number, world.rank, world.world_size, state.step, flush=True)
"""


def test_a_rank_joins_a_running_job() -> None:
    """At the next commit: with the step that the others have come to, and the last rank."""
    body = """\
        while world.world_size < 2:
            state.step += 1
            state.commit()
            time.sleep(0.01)
        same, = world.allreduce([state.step], op='max')
        print('same', same == state.step, state.step > 0, flush=True)
"""
    with daemon() as address:
        options = ["--elastic=1:2", f"--address={address}", "--job=j"]
        command = arguments(1, *script(_LOOP + body), options=options)
        first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "[0] in 1 0 1 0\n"
            second = launch(1, *script(_LOOP + body), options=options)
            out, err = first.communicate(timeout=100)
        finally:
            first.kill()
            first.wait()
    assert (first.returncode, second.returncode) == (0, 0), err + second.stderr
    regrouped, same = out.splitlines()
    assert regrouped.startswith("[0] in 2 0 2 ")
    assert second.stdout.splitlines() == [regrouped.replace("in 2 0", "in 2 1"), "[0] same True True"]
    assert same == "[0] same True True"


@pytest.mark.fault
def test_the_state_that_was_saved_last() -> None:
    """A rank had not saved yet when another one was lost: it goes on from what a third one has, as that one does."""
    body = """\
        if generation.number == 1:
            for _ in range(rank):
                state.step += 1
                state.save()
            state.step = 99
            world.barrier()
            if rank == 2: os.kill(os.getpid(), 9)
            world.barrier()
"""
    done = launch(3, *script(_LOOP + body), options=["--elastic=2:3", "--max-restarts=0"])
    assert done.returncode == 0, done.stderr
    assert {"[0] in 2 0 2 1", "[1] in 2 1 2 1"} <= set(done.stdout.splitlines())


@pytest.mark.fault
def test_too_few_are_left() -> None:
    """The launcher knows that no rank will come: it ends the job, with the code of the one that was one too many."""
    body = "        while True:\n            world.barrier()\n            if rank == 1: os.kill(os.getpid(), 9)\n"
    done = launch(2, *script(_LOOP + body), options=["--elastic=2:2", "--max-restarts=0", "--grace=0.5"])
    assert done.returncode == 137, done.stderr
    assert "bnlayer launch: rank 1 was killed by SIGKILL\n" in done.stderr
    assert "bnlayer launch: 1 rank is left, fewer than the 2 of --elastic, and no restart (--max-re" in done.stderr


def test_what_the_loop_refuses() -> None:
    """A pass without its block, and states that differ between ranks."""
    without = _LOOP.partition("    with")[0] + "    pass\n"
    done = launch(1, *script(without), options=["--elastic=1:1", "--max-restarts=0"])
    assert done.returncode == 1
    assert "RuntimeError: elastic(): expected `with generation as world:` around the body of the loop." in done.stderr
    other = _LOOP.replace("step=0)", "step=0, **{f'of_{rank}': 0})").replace(", state.step", "")
    done = launch(2, *script(other), options=["--elastic=1:2", "--max-restarts=0"])
    assert done.returncode == 1
    text = 'The ranks made different states: rank 1 made another one than {"names": ["step", "of_0"], "layers": []}.'
    assert done.stderr.count(f"MismatchError: {text} Make the same State on every rank.") == 2
