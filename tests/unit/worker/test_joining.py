"""`join` and what a world does to its process: the current collective, leaving at exit, the one live world."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

import bnworker
from bnlayer import BatchNormalization, StallError, collective
from bnworker import World
from bnworker.presence import failure
from bnworker.transports.alone import AloneTransport


class Listening(AloneTransport):
    """A world of one that remembers how it was left, and fails when told to."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.error: Exception | None = None

    def barrier(self, call: Any) -> None:
        """Raise what was asked for."""
        if self.error is not None:
            raise self.error

    def leave(self, reason: str) -> None:
        """Remember the reason."""
        self.reasons.append(reason)


@pytest.fixture(autouse=True)
def nothing_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out the variables that a launcher, or the person at the keyboard, may have set."""
    for name in list(os.environ):
        if name.startswith(("BNLAYER_", "OMPI_", "PMI_", "SLURM_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


def test_join_makes_the_world_current_until_it_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """A synchronized layer finds it; the choice is logged."""
    before, hook = collective.current(), sys.excepthook
    with caplog.at_level(logging.INFO, "bnworker"), bnworker.join() as world:
        assert (world.rank, world.world_size, world.transport) == (0, 1, "alone")
        assert collective.current() is world
        bn = BatchNormalization(synchronized=True, name="found")
        bn([[1.0], [3.0]], training=True)
        assert sum(world.statistics.exchanges.values()) == 3
    assert collective.current() is before
    assert sys.excepthook is hook
    assert caplog.messages == ["rank 0 of 1, transport alone: nothing announces other ranks"]


def test_a_second_join_is_refused_and_a_later_one_is_not() -> None:
    """One live world in a process."""
    with bnworker.join(), pytest.raises(RuntimeError) as caught:
        bnworker.join()
    assert str(caught.value) == (
        "This process has joined already: World(rank=0, world_size=1, transport='alone'). "
        "Use it, or leave it first (world.leave())."
    )
    bnworker.join().leave()
    bnworker.join().leave()


def test_a_batch_script_is_no_step(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It trained alone in silence, whoever had forgotten srun."""
    line = (
        "SLURM_PROCID=0 and SLURM_NTASKS=4 are set, but SLURM_STEP_ID is not: this process is a batch script or a "
        "child of one, not a rank, and trains alone. Start the ranks with srun, or with bnlayer launch."
    )
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    bnworker.join().leave()
    assert caplog.messages == [line]
    caplog.clear()
    collective._say_why_alone.cache_clear()
    for _ in range(2):  # a layer whose program never joins
        collective.current()
    assert caplog.messages == [line]
    caplog.clear()
    bnworker.join(transport="alone").leave()  # asked for
    monkeypatch.setenv("SLURM_NTASKS", "1")
    bnworker.join().leave()
    assert caplog.messages == []
    collective._say_why_alone.cache_clear()


def test_a_forked_process_cannot_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its parent's connections, and would speak in its place."""
    with bnworker.join(), monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: 1)
        with pytest.raises(RuntimeError) as caught:
            bnworker.join()
    assert str(caught.value) == (
        "Process 1 was forked from one that has joined, World(rank=0, world_size=1, transport='alone'): a rank is one "
        "process. Start this one with subprocess, or multiprocessing's 'spawn', or before joining."
    )


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), True])
def test_a_timeout_is_a_number_of_seconds(timeout: float) -> None:
    """Waiting for ever is not offered."""
    with pytest.raises(ValueError, match=r"^join\(timeout=\): expected a number of seconds above 0, received"):
        bnworker.join(timeout=timeout)


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is the process's own."""
    monkeypatch.setenv("BNLAYER_TRANSPORT", "nccl")
    with pytest.raises(ValueError, match="BNLAYER_TRANSPORT: expected 'alone', 'mpi', 'service' or 'torch'"):
        bnworker.join()


def test_mpi_without_mpi4py_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing joined behind."""
    monkeypatch.delitem(sys.modules, "bnworker.transports.mpi", raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"needs mpi4py and an MPI: pip install 'bnlayer\[mpich\]' brings both"):
        bnworker.join(transport="mpi")
    bnworker.join().leave()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, ""),
        (SystemExit(), ""),
        (SystemExit(0), ""),
        (SystemExit(3), "failed with SystemExit: 3"),
        (SystemExit("usage"), "failed with SystemExit: usage"),
        (ValueError("no such file\nand more"), "failed with ValueError: no such file"),
        (KeyboardInterrupt(), "failed with KeyboardInterrupt"),
        (ValueError("x" * 500), "failed with ValueError: " + "x" * 175 + "…"),
    ],
)
def test_an_exception_is_described_in_one_line(error: BaseException | None, reason: str) -> None:
    """The first line, and no more than fits into the others' errors."""
    assert failure(error) == reason


def test_leaving_tells_the_reason_once() -> None:
    """`with` leaves once, with the exception that passes through it."""
    transport = Listening()
    with pytest.raises(ValueError), World(transport, install=False) as world:
        raise ValueError("boom")
    world.leave()
    assert transport.reasons == ["failed with ValueError: boom"]


def test_a_collective_error_ends_the_world_and_others_do_not() -> None:
    """The error comes back as a fresh exception, at once; leaving is still said once."""
    transport = Listening()
    world = World(transport, install=False)
    transport.error = OverflowError("too large")
    with pytest.raises(OverflowError):
        world.barrier()
    transport.error = None
    world.barrier()
    transport.error = StallError("stuck", ranks=(1,), layer="a", step=3)
    with pytest.raises(StallError) as first:
        world.barrier()
    transport.error = None
    with pytest.raises(StallError) as second:
        world.allreduce([1.0])
    assert second.value is not first.value
    assert (str(second.value), second.value.ranks, second.value.layer, second.value.step) == ("stuck", (1,), "a", 3)
    with pytest.raises(StallError):
        world.pull("a")
    world.leave()
    assert transport.reasons == [""]
    with pytest.raises(StallError):
        world.barrier()


def test_shard_wants_a_count() -> None:
    """Neither a float nor a negative number."""
    world = World(Listening(), install=False)
    with pytest.raises(TypeError):
        world.shard(3.0)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match=r"^shard\(n\): expected n >= 0, received -1\.$"):
        world.shard(-1)


@pytest.mark.parametrize(
    ("ending", "code", "reason"),
    [
        ("pass", 0, ""),
        ("raise ValueError('boom')", 1, "failed with ValueError: boom"),
        ("with world: raise SystemExit(3)", 3, "failed with SystemExit: 3"),
        ("with world: pass", 0, ""),
    ],
)
def test_however_a_process_ends_it_leaves_its_job(ending: str, code: int, reason: str) -> None:
    """A normal exit, an exception that nobody catches (its traceback is printed), an exit out of `with`."""
    script = textwrap.dedent(f"""
        from bnworker import World
        from bnworker.transports.alone import AloneTransport
        class Listening(AloneTransport):
            def leave(self, reason):
                print("left:", repr(reason), flush=True)
        world = World(Listening())
        {ending}
    """)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert (ended.returncode, ended.stdout) == (code, f"left: {reason!r}\n")
    assert ("ValueError: boom" in ended.stderr) == ("boom" in ending)
