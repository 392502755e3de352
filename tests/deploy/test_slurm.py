"""The batch scripts on a real Slurm cluster of two nodes, which the tests start for themselves.

Each job is made to stop in another of the ways in which a batch system does it, is put back into the queue, and goes
on: the checkpoint that it leaves has the bytes of a run that nobody stopped, and that no cluster ran.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.datasets import write
from support.slurm import Cluster, cluster
from support.training import COMMAND

pytestmark = [pytest.mark.slow, pytest.mark.rpc, pytest.mark.mpi, pytest.mark.timeout(1200)]

_SCRIPTS = Path(__file__).parents[2] / "deploy" / "slurm"
_RUN = ("--epochs=100000", "--hidden=8", "--batch-size=16", "--dtype=float64", "--seed=5")
_TWO_RANKS = ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1")
_MORE_STEPS = 20


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with the nodes n1 and n2."""
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.mark.parametrize(
    ("script", "stop"),
    [
        ("srun.sbatch", ("scontrol", "requeue")),  # as pre-emption does
        ("mpiexec.sbatch", ("scancel", "--batch", "--signal=USR1")),  # as --signal=B:USR1@120 before the time is over
        ("service.sbatch", ("scancel", "--signal=USR1")),  # as --signal=USR1@120
    ],
    ids=["srun, pre-empted", "mpiexec, its time is over", "service, its time is over"],
)
def test_a_stopped_job_is_resumed(script: str, stop: tuple[str, ...], slurm: Cluster, tmp_path: Path) -> None:
    """It writes a checkpoint, is put back into the queue, and goes on to the bits of an undisturbed run."""
    data, config = str(write(tmp_path / "data", [300])), tmp_path / "run.toml"
    config.write_text("save-every = 5\n", encoding="ascii")  # and without an end
    job = slurm.submit(_SCRIPTS / script, data, f"--config={config}", *_RUN, options=_TWO_RANKS, cwd=tmp_path)
    log, saved = tmp_path / f"bnlayer-{job}.log", tmp_path / f"bnlayer-{job}.safetensors"
    _await_file(saved, log)

    done = slurm.run(*stop, str(job), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    slurm.wait(job, "PENDING", log)
    said = log.read_text(encoding="utf-8")
    by = "SIGTERM" if "requeue" in stop else "SIGUSR1"
    (steps,) = re.findall(rf"^bnlayer: train: {by}: stopped after step (\d+); {saved.name} goes on", said, re.MULTILINE)

    last = int(steps) + _MORE_STEPS
    config.write_text(f"save-every = 5\nsteps = {last}\n", encoding="ascii")
    slurm.release(job)
    slurm.wait(job, "COMPLETED", log)
    said = log.read_text(encoding="utf-8")
    assert f"resumed after step {steps}\n" in said
    assert ("2 (service)" if script == "service.sbatch" else "2 (mpi)") in said

    uninterrupted = tmp_path / "whole.safetensors"
    subprocess.run(
        [*COMMAND, f"--data={data}", *_RUN, "--workers=2", f"--steps={last}", f"--save={uninterrupted}"],
        env={**slurm.environ, "BNLAYER_VENV": ""},
        capture_output=True,
        timeout=200,
        check=True,
    )
    assert saved.read_bytes() == uninterrupted.read_bytes()


_WHO = """
import os, sys
from bnlayer.environment import announced, batch_script
ranks = [f"{found.rank} of {found.world_size}" for found in announced(os.environ)]
print(sys.argv[1], *(ranks or ["is no rank"]), "warned" if batch_script(os.environ) else "not warned", flush=True)
"""
# Two components: one task on the first node, two on the second.
_HETEROGENEOUS = """\
#!/bin/sh
#SBATCH --ntasks=1 --nodelist=n1
#SBATCH hetjob
#SBATCH --ntasks=2 --nodelist=n2
{python} who.py batch
srun --het-group=0,1 {python} who.py step
srun --het-group=1 {python} who.py second-component
"""


def test_which_processes_are_ranks(slurm: Cluster, tmp_path: Path) -> None:
    """Tasks of a step are, heterogeneous ones numbered through; what runs beside the steps is not."""
    (tmp_path / "who.py").write_text(_WHO, encoding="ascii")
    for tasks in (("--ntasks=2",), ("--ntasks=1", ":", "--ntasks=2")):
        done = slurm.run("salloc", "-Q", *tasks, sys.executable, "who.py", "salloc", cwd=tmp_path)
        assert done.stdout == "salloc is no rank warned\n", done.stderr

    script, log = tmp_path / "het.sbatch", tmp_path / "het.log"
    script.write_text(_HETEROGENEOUS.format(python=sys.executable), encoding="utf-8")
    # srun says there when it waits for a processor.
    job = slurm.submit(script, options=[f"--output={log}", "--error=/dev/null"], cwd=tmp_path)
    slurm.wait(job, "COMPLETED", log)
    assert sorted(log.read_text(encoding="utf-8").splitlines()) == [
        "batch is no rank not warned",
        "second-component 0 of 2 not warned",
        "second-component 1 of 2 not warned",
        "step 0 of 3 not warned",
        "step 1 of 3 not warned",
        "step 2 of 3 not warned",
    ]

    # It has the variables of rank 0 of 2.
    script.write_text(f"#!/bin/sh\n{sys.executable} who.py batch\n", encoding="utf-8")
    job = slurm.submit(script, options=["--ntasks=2", f"--output={log}", "--open-mode=truncate"], cwd=tmp_path)
    slurm.wait(job, "COMPLETED", log)
    assert log.read_text(encoding="utf-8") == "batch is no rank warned\n"

    # It is submitted from within a step, and has that one's variables of step and PMI as well.
    script.write_text(
        f"#!/bin/sh\n{sys.executable} who.py batch\nsrun --mpi=none {sys.executable} who.py step 2>/dev/null\n",
        encoding="utf-8",
    )
    submit = f'test "$SLURM_PROCID" = 0 || exec sbatch --wait --ntasks=2 --output={log} --open-mode=truncate {script}'
    done = slurm.run("srun", "--ntasks=2", "--mpi=pmi2", "sh", "-c", submit, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(log.read_text(encoding="utf-8").splitlines()) == [
        "batch is no rank warned",
        "step 0 of 2 not warned",
        "step 1 of 2 not warned",
    ]


def _await_file(path: Path, log: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        said = log.read_text(encoding="utf-8") if log.exists() else "nothing"
        assert time.monotonic() < deadline, f"there is no {path.name} yet; the job's output:\n{said}"
        time.sleep(0.05)
