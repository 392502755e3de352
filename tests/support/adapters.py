"""What the adapters' tests share: shards of a batch, and programs started as the frameworks' users start theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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


def batch(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    """A batch of the union, the same on every rank; of mean 3 and standard deviation 2."""
    rng = np.random.default_rng(seed)
    import torch

    return torch.from_numpy(rng.normal(3, 2, shape)).to(dtype)


def network(dtype: Any) -> Any:
    """Two parallel branches, summed, and a normalization that is used twice; of torch's own layers."""
    import torch

    class Network(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            make = torch.nn.Conv2d
            self.stem, self.left, self.right = make(2, 4, 3, padding=1), make(4, 4, 3), make(4, 4, 3)
            self.first, self.second, self.twice = (torch.nn.BatchNorm2d(4) for _ in range(3))
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x: Any) -> Any:
            x = torch.tanh(self.stem(x))
            x = self.first(self.left(x)) + self.second(self.right(x))
            x = self.twice(torch.tanh(self.twice(x)))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    return Network().to(dtype)


def one_training(dtype: Any, rows: slice, prepared: Callable[[Any], Any]) -> dict[str, Any]:
    """Twenty steps of the network on twelve rows a step, of which this process has some.

    The loss is the union's: each rank's share counts as DistributedDataParallel averages, times the number of ranks.
    """
    import torch

    model = prepared(network(dtype))
    plain = getattr(model, "module", model)
    ranks = torch.distributed.get_world_size() if model is not plain else 1
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x = None
    for step in range(20):
        x = batch((12, 2, 6, 6), dtype, step)[rows].requires_grad_()
        target = torch.arange(12)[rows] % 3
        loss = torch.nn.functional.cross_entropy(model(x), target, reduction="sum") * ranks / 12
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert x is not None
    return {**plain.state_dict(), "input gradient": x.grad / ranks}
