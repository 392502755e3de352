"""Jobs that end badly under mpiexec: no rank hangs, every rank gets the error, nothing is left behind."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from support import mpi
from support.contract.disagreements import without_hosts

pytestmark = [pytest.mark.mpi, pytest.mark.fault]

TIMEOUT_S = 6.0  # of ending_rank.py
AT_ONCE_S = 2.0  # a second, and another for a machine that does other things; by the deadline it would be six


def end(world_size: int, way: str, folder: Path) -> tuple[mpi.Ended, list[Any]]:
    """Let the last rank end in some way; how the job ended, and what each of the others was told: when it had begun."""
    script = Path(__file__).with_name("ending_rank.py")
    ended = mpi.run(world_size, script, way, folder, limit_s=200)
    for file in folder.glob("*.pid"):
        wait_for_end(int(file.read_text(encoding="utf-8")))
    return ended, [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def wait_for_end(pid: int) -> None:
    """Return when a process is gone: mpiexec may end a little before the last rank does."""
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} was left behind"
        os.sched_yield()


@pytest.mark.parametrize(
    ("world_size", "way", "kind", "what"),
    [
        (2, "fails", "PeerLostError", "failed with ValueError: no such file"),
        (3, "fails", "PeerLostError", "failed with ValueError: no such file"),
        (3, "exits-3", "PeerLostError", "failed with SystemExit: 3"),
        (3, "returns", "StallError", "left the job"),
    ],
)
def test_leaving_is_reported_at_once(world_size: int, way: str, kind: str, what: str, tmp_path: Path) -> None:
    """An exception, a failing exit and an early return reach the others at once; the job fails."""
    ended, events = end(world_size, way, tmp_path)
    assert ended.code != 0, ended.err
    assert len(events) == world_size - 1, ended.err
    odd = float((tmp_path / "odd").read_text(encoding="utf-8"))
    for name, text, ranks, began, told in events:
        assert name == kind
        assert without_hosts(text).startswith(f"rank {world_size - 1} {what}")
        assert ranks == [world_size - 1]
        assert told - max(began, odd) < AT_ONCE_S
    assert len({text for _, text, *_ in events}) == 1


@pytest.mark.parametrize(("world_size", "way"), [(2, "freezes"), (3, "freezes"), (3, "freezes-midway")])
def test_a_frozen_rank_is_named_at_the_deadline(world_size: int, way: str, tmp_path: Path) -> None:
    """A rank that is stopped (SIGSTOP), before an exchange or in the middle of it; the job ends, and fails."""
    ended, events = end(world_size, way, tmp_path)
    assert ended.code != 0, ended.err
    assert len(events) == world_size - 1, ended.err
    waiting = "rank 0 waits" if world_size == 2 else "rank 0, rank 1 wait"
    first = min(began for *_, began, _ in events)
    for name, text, ranks, began, told in events:
        assert name == "PeerLostError"
        assert without_hosts(text) == (
            f"rank {world_size - 1} did not come within 6 s (last seen completing barrier (number 1)). {waiting} in "
            "allreduce (number 2)."
        )
        assert ranks == [world_size - 1]
        assert told >= first + TIMEOUT_S  # told by the first to give up, who may have come a little earlier
        assert told < began + 2 * TIMEOUT_S
    assert len({text for _, text, *_ in events}) == 1
    assert "ends the whole MPI job" in ended.err


def test_a_late_rank_is_not_blamed(tmp_path: Path) -> None:
    """Rank 2 computes for longer than rank 0 waits. Rank 1 came late as well, but it came: it is told at once."""
    ended, events = end(3, "is-slow", tmp_path)
    assert ended.code != 0, ended.err
    assert [ranks for _, _, ranks, *_ in events] == [[2], [2]], ended.err
    (_, first, _, began, gave_up), (_, second, _, _, told) = events
    late = "rank 2 did not come within 6 s (last seen completing barrier (number 1))"
    assert without_hosts(first) == f"{late}. rank 0, rank 1 wait in allreduce (number 2)."
    assert second == first
    assert gave_up >= began + TIMEOUT_S
    assert told < gave_up + AT_ONCE_S  # by itself it would have waited for longer


def test_a_crash_ends_the_job(tmp_path: Path) -> None:
    """kill -9 of a rank: mpiexec ends all of them, non-zero."""
    ended, _ = end(3, "crashes", tmp_path)
    assert ended.code != 0, ended.err


def test_an_interrupted_exchange_ends_the_job(tmp_path: Path) -> None:
    """Ctrl-C in one rank's exchange: it can't leave in order any more, so it ends all ranks."""
    ended, _ = end(2, "is-interrupted", tmp_path)
    assert ended.code != 0, ended.err
    assert "KeyboardInterrupt" in ended.err
    assert "ends the whole MPI job" in ended.err


def test_joining_does_not_wait_for_ever(tmp_path: Path) -> None:
    """A rank that never joins: MPI's own initialization can't be interrupted, so it is ended from outside."""
    ended, _ = end(2, "never-joins", tmp_path)
    assert ended.code != 0, ended.err
    assert "in _initialize_mpi_or_exit" in ended.err


def test_an_mpiexec_of_another_mpi_is_noticed() -> None:
    """Each rank would be alone in a world of its own, and train for itself."""
    code = "import bnworker; bnworker.join(transport='mpi', rank=1, world_size=2)"
    ended = mpi.run(1, "-c", code)
    assert ended.code != 0, ended.err
    assert "RuntimeError: This process is rank 1 of 2 (transport= says so; rank= and world_size= are given" in ended.err
    assert "but to mpi4py it is rank 0 of 1. Start it with the mpiexec of the MPI that mpi4py uses" in ended.err


def test_two_worlds_one_after_the_other() -> None:
    """A world that was left can be followed by another; nothing of the first remains."""
    code = (
        "import bnworker, numpy as np\n"
        "for _ in range(3):\n"
        "    with bnworker.join(timeout=60) as world:\n"
        "        assert world.allreduce([world.rank])[0] == 1\n"
    )
    ended = mpi.run(2, "-c", code)
    assert ended.code == 0, ended.err
