"""Ranks of torchrun, without an address: they find the service of rank 0 through the store of torchrun's agent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
