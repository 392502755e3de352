"""What the adapters' tests share: shards of a batch, and programs started as the frameworks' users start theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SIZES = {1: (12,), 2: (7, 5), 3: (7, 0, 5)}  # rows by rank: uneven, and one shard is empty
_TESTS = Path(__file__).parents[1]


def shard(rank: int, world_size: int) -> slice:
    """This rank's rows of the twelve that all tests use."""
    start = sum(SIZES[world_size][:rank])
    return slice(start, start + SIZES[world_size][rank])


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        code: its exit code.
        out, err: what it wrote.
    """

    code: int
    out: str
    err: str


def run(command: Sequence[str | Path], *, environ: Mapping[str, str] | None = None, limit_s: float = 200) -> Ended:
    """Run a program to its end, in a process group that does not outlive the call.

    Raises:
        subprocess.TimeoutExpired: it has not ended within the limit.
    """
    launchers = ("BNLAYER_", "OMPI_", "PMI_", "SLURM_", "TORCHELASTIC_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    path = os.pathsep.join(filter(None, (str(_TESTS), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environ or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return Ended(process.returncode, out, err)


def torchrun(world_size: int, *arguments: str | Path, limit_s: float = 200) -> Ended:
    """Run a script on so many ranks of this machine under torchrun, and wait for its end."""
    # --standalone looks for a free port itself, so that jobs side by side don't meet.
    options = ["--standalone", f"--nproc-per-node={world_size}"]
    return run([sys.executable, "-m", "torch.distributed.run", *options, *arguments], limit_s=limit_s)
