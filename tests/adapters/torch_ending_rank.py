"""Jobs of three ranks that can't go on: what the others are told, and when.

python torch_ending_rank.py FOLDER ENDING...

The ranks are forked, so that torch is imported once. What torchrun's agent does, the store, another child does: it has
threads, and a process with threads must not fork, as its child may wait for a lock that one of them held.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bnlayer import CollectiveError
from bnlayer.adapters.torch import SyncBatchNorm

ODD = 1  # the rank that does something else


RANKS = 3
_HANGS_S = 120  # that no rank takes: it prints where it is then, and ends


def main(folder: Path, endings: list[str]) -> None:
    """Run the jobs, one after the other."""
    port, agent = _agent()
    for ending in endings:
        (folder / ending).mkdir()
        pids = []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                _as_a_process(folder / ending, ending, rank, port)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
    os.kill(agent, signal.SIGKILL)
    os.waitpid(agent, 0)


def _agent() -> tuple[int, int]:
    """Start the store in a process of its own; its port, and the process."""
    reading, writing = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(writing, f"{store.port}\n".encode())
        while os.getppid() == parent:  # which ends it; it does not outlive the parent
            time.sleep(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="ascii") as pipe:
        return int(pipe.readline()), pid


def _as_a_process(folder: Path, ending: str, rank: int, port: int) -> None:
    """Run a rank in a forked child, with the end of an ordinary process."""
    code = 0
    faulthandler.dump_traceback_later(_HANGS_S, exit=True)
    try:
        store = dist.PrefixStore(ending, dist.TCPStore("127.0.0.1", port, None, False))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
        _train(folder, ending)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    os._exit(code)


def _train(folder: Path, ending: str) -> None:
    """Train a step with everyone, then one in which a rank does something else."""
    layers = [SyncBatchNorm(3, name=name) for name in ("first", "second")]
    rank, odd = dist.get_rank(), dist.get_rank() == ODD
    record = folder / str(rank)
    _step(layers, skip_forward=False, skip_backward=False)
    try:
        if odd:
            record.write_text(f"{time.monotonic()} odd")
            if ending == "raises":
                raise KeyError("mine")
            if ending == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
        _step(layers, skip_forward=odd and ending == "skips", skip_backward=odd and ending == "skips back")
    except CollectiveError as error:
        record.write_text(f"{time.monotonic()} {type(error).__name__} {error}")
        return
    if not odd:
        record.write_text(f"{time.monotonic()} nothing happened")


def _step(layers: list[Any], *, skip_forward: bool, skip_backward: bool) -> None:
    x = torch.arange(12.0).reshape(4, 3).requires_grad_()
    first = layers[0](x)
    second = first if skip_forward else layers[1](first)
    (first if skip_backward else second).square().sum().backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
