"""A service that the ranks of a Slurm step bring along: rank 0 starts it, the others find it, and it ends with them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from bnworker.launcher.guardian import carriers, sweep
from support.environments import SRUN
from support.hosts import hosts, needs_root

pytestmark = pytest.mark.rpc

_LEFT_S = 30.0  # the service waits up to 10 s for ranks, and drains within 5
_JOINED = """\
import bnworker, os, signal, sys, time
with bnworker.join() as w:
    w.barrier()
    print(w.transport, w.rank, w.world_size, flush=True)
"""
_KILLED = """\
    if w.rank == {0}: os.kill(os.getpid(), signal.SIGKILL)
    w.barrier()
"""


@contextmanager
def step(
    program: str, tasks: int, nodes: str, prefixes: Sequence[Sequence[str]] = ((),), **variables: str
) -> Iterator[tuple[list[subprocess.Popen[str]], bytes]]:
    """The tasks of a step as processes, on each host in turn, and a mark that they and all of theirs carry."""
    mark = f"STEP_UNDER_TEST={secrets.token_hex(8)}"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("BNLAYER_", "SLURM_"))}
    # A port of this test's own: it follows from the job's number.
    step = {
        "SLURM_JOB_ID": str(secrets.randbelow(10**6)),
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(len(prefixes)),
    }
    running = [
        subprocess.Popen(
            [*prefixes[rank % len(prefixes)], sys.executable, "-c", program],
            env={**environ, **SRUN, **step, "SLURM_PROCID": str(rank), **dict([mark.split("=")]), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(tasks)
    ]
    try:
        yield running, mark.encode()
    finally:
        sweep(mark.encode())
        for process in running:
            process.communicate()


def _left(mark: bytes) -> list[int]:
    deadline = time.monotonic() + _LEFT_S
    while (left := carriers(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_ranks_on_one_host() -> None:
    """Nothing is given but what srun sets, and what is another daemon's; nothing is left."""
    with step(_JOINED, 3, "here", BNSERVER_TLS_CERT="none") as (running, mark):
        said = [process.communicate(timeout=200) for process in running]
        assert [process.returncode for process in running] == [0, 0, 0], said
        assert [out for out, _ in said] == [f"service {rank} 3\n" for rank in range(3)]
        assert _left(mark) == []


@pytest.mark.fault
@pytest.mark.parametrize("killed", [0, 2])
def test_a_rank_is_killed(killed: int) -> None:
    """The others are told of it, by the service, even where it is the rank that started it; then that ends."""
    with step(_JOINED + _KILLED.format(killed), 3, "here") as (running, mark):
        said = [process.communicate(timeout=200) for process in running]
        for rank, (process, (_, err)) in enumerate(zip(running, said, strict=True)):
            assert process.returncode == (-signal.SIGKILL if rank == killed else 1), err
            assert rank == killed or f"PeerLostError: rank {killed} (host " in err
        assert _left(mark) == []


@needs_root
def test_ranks_on_two_hosts() -> None:
    """The first host of the step has the service; plain text needs a word."""
    with hosts("one", "two") as (one, two):
        before = two.sent()
        prefixes = (one.prefix, two.prefix)
        with step(_JOINED, 2, "10.77.0.[1-2]", prefixes, BNLAYER_INSECURE="1") as (running, mark):
            said = [process.communicate(timeout=200) for process in running]
            assert [process.returncode for process in running] == [0, 0], said
            assert _left(mark) == []
        assert two.sent() > before + 1000  # through its interface
        with step(_JOINED, 2, "10.77.0.[1-2]", prefixes) as (running, _):
            for process in running:
                _, err = process.communicate(timeout=200)
                assert "in plain text and without a check of who joins: set BNLAYER_INSECURE=1" in err
