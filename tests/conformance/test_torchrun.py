"""Ranks of torchrun, without an address: they find the service of rank 0 through the store of torchrun's agent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.service import daemon

pytest.importorskip("torch")
pytestmark = [pytest.mark.keras, pytest.mark.rpc]

# torchrun's ranks share one pipe and run unbuffered: a line that is written in pieces mixes with another rank's.
_RANK = """\
import logging, sys, bnworker
logging.basicConfig(level=logging.INFO)
with bnworker.join() as w:
    w.barrier()
    sys.stdout.write(f"{w.transport} {w.rank} {w.world_size}\\n")
"""


_TRAINS = """\
import os, pathlib, signal, sys, threading, time
from bnworker.cli import main

def kill():
    while not pathlib.Path("run.safetensors").exists():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] != "whole" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    threading.Thread(target=kill, daemon=True).start()
files = ["--save=run.safetensors", "--save-every=5", "--resume"]
sys.argv[1:] = ["train", "--epochs=1000", "--steps=200", "--hidden=8", *files]
main()
"""


_WITHOUT_ID = ["--nnodes=1", "--rdzv-id=none", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


@pytest.mark.parametrize("rendezvous", [["--standalone"], _WITHOUT_ID], ids=["id", "none"])
def test_ranks_of_torchrun(rendezvous: list[str], tmp_path: Path) -> None:
    """With an id of the run, which names the job, and without one."""
    script = tmp_path / "rank.py"
    script.write_text(_RANK, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node=2", str(script)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["service 0 2", "service 1 2"]
    assert "torchrun announces 2 ranks; RANK says the rank" in done.stderr
    assert "rank 0 starts the service at 127.0.0.1:0" in done.stderr


def test_restarts_of_torchrun(tmp_path: Path) -> None:
    """A rank is killed, and torchrun starts all of them again: they go on from the checkpoint, to the same bytes.

    Over a service that was there before, where they are a new generation of the job; and over that of rank 0.
    """
    (tmp_path / "rank.py").write_text(_TRAINS, encoding="utf-8")
    files = {}
    with daemon() as address:
        for how in ("whole", "killed, kept service", "killed, own service"):
            folder = tmp_path / how
            folder.mkdir()
            environ = {name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")}
            environ |= {"BNLAYER_ADDRESS": address, "BNLAYER_JOB": "j"} if "kept" in how else {}
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
            done = subprocess.run(
                [*torchrun, "--nproc-per-node=2", "../rank.py", how],
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
                env=environ,
                cwd=folder,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert ("resumed after step" in done.stdout + done.stderr) is (how != "whole")
            files[how] = (folder / "run.safetensors").read_bytes()
    assert len(set(files.values())) == 1
