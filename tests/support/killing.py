"""Training that is killed again and again, and goes on each time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bnworker.train.checkpoint import read
from support.training import COMMAND

RANKS = 3
_ENDLESS = 1_000_000  # of a run that is to be killed, however long a busy machine needs to do it
_STEPS_LEFT = 20  # that one makes which nobody kills any more
_ELASTIC_STEPS_PER_KILL = 100  # while a rank is started again, the others go on
# The same bits in slower steps: else the others would be done before the rank that is started again is there.
_ELASTIC_KERNELS = {"BNLAYER_KERNELS": "reference"}
_OPTIONS = ("--data=digits", "--epochs=1000000", "--hidden=16,8", "--seed=7")
_MARK = "BNLAYER_TEST_MARK"  # inherited by all that a launch starts, so that it can be found
_RANK = (b"BNLAYER_RANK", b"PMI_RANK", b"OMPI_COMM_WORLD_RANK")
# Of each of the campaigns that `make test-long` runs: KILLS=20 make test-long takes half an hour.
KILLS = int(os.environ.get("KILLS", "5"))

Summary = dict[str, Any]

_LIMIT_S = 150.0
_LAUNCHER, _ALL = -1, -2  # victims that are no rank; all: every rank, the launcher and the service


def undisturbed(folder: Path, transport: str, steps: int, *, ranks: int = RANKS) -> bytes:
    """The file that a run of so many steps leaves which nobody disturbs."""
    path = folder / "whole.safetensors"
    with _Launch(path, transport, ranks, 50, steps) as launch:
        assert launch.wait() == 0, launch.output()
    return path.read_bytes()


def killed_and_resumed(
    folder: Path, transport: str, kills: int, seed: int, *, ranks: int = RANKS, whole_job: bool = False
) -> tuple[bytes, int, list[str]]:
    """Kill a run with -9 so many times, go on each time, and then let it make the rest of its steps.

    Who is killed, how many checkpoints after the start, how long after that, and how often checkpoints are written
    is drawn; with `whole` it is all of it, each time. How many steps it makes until then is left to the machine.

    Returns:
        The file that it leaves; how many steps it made; and the story, a line a kill.
    """
    path, rng = folder / "parts.safetensors", np.random.default_rng(seed)
    story: list[str] = []
    made = 0
    for _ in range(kills):
        drawn, every = int(rng.integers(ranks + 1)), int(rng.integers(1, 6))
        victim = _ALL if whole_job else _LAUNCHER if drawn == ranks else drawn
        checkpoints, delay = int(rng.integers(3)), float(rng.uniform(0, 0.05))
        with _Launch(path, transport, ranks, every, _ENDLESS) as launch:
            launch.await_ranks()
            launch.await_checkpoints(checkpoints)
            time.sleep(delay)  # no matter where this hits it: that is what is tested
            launch.kill(victim)
            code = launch.wait()
            assert code != 0, f"the run was over before it was killed: {story}"
        checkpoint = read(path)
        made = checkpoint.progress.steps if checkpoint else 0
        who = {_LAUNCHER: "launcher", _ALL: "all"}.get(victim, f"rank {victim}")
        story.append(f"{who}: exit code {code}, checkpoint at step {made}")
    with _Launch(path, transport, ranks, 50, made + _STEPS_LEFT) as launch:
        assert launch.wait() == 0, launch.output()
    return path.read_bytes(), made + _STEPS_LEFT, story


def killed_and_going_on(folder: Path, kills: int, seed: int, *, ranks: int = 3) -> tuple[Summary, Summary, str]:
    """An elastic job whose ranks are killed with -9, one after the other, at moments that are drawn.

    Returns:
        Summaries of an undisturbed process, and of this job; and what it wrote.
    """
    steps, rng = _ELASTIC_STEPS_PER_KILL * (kills + 1), np.random.default_rng(seed)
    undisturbed = ("--transport=none", "--workers=1", f"--steps={steps}", f"--summary={folder / 'whole.json'}")
    subprocess.run([*COMMAND, *_OPTIONS, *undisturbed], capture_output=True, timeout=_LIMIT_S, check=True)
    elastic = (f"--elastic=2:{ranks}", f"--max-restarts={kills}", f"--summary={folder / 'parts.json'}")
    with _Launch(folder / "parts.safetensors", "service", ranks, 5, steps, elastic, _ELASTIC_KERNELS) as launch:
        for _ in range(kills):
            launch.await_ranks()
            launch.await_checkpoints(1 + int(rng.integers(3)))
            time.sleep(float(rng.uniform(0, 0.05)))  # no matter where this hits it: that is what is tested
            launch.kill(int(rng.integers(ranks)))
        assert launch.wait() == 0, launch.output()
        output = launch.output()
    expected, parts = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("whole", "parts"))
    return expected, parts, output


class _Launch:
    """One start of the training; gone, all of it, when the `with` block is left."""

    def __init__(
        self,
        path: Path,
        transport: str,
        ranks: int,
        every: int,
        steps: int,
        options: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._path, self._count = path, ranks
        self._mark = f"{_MARK}={path}".encode()
        self._log = path.with_suffix(".log")
        environ = {name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")}
        saving = (f"--save={path}", f"--save-every={every}", "--resume")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *COMMAND,
                    *_OPTIONS,
                    *options,
                    f"--workers={ranks}",
                    f"--steps={steps}",
                    f"--transport={transport}",
                    *saving,
                ],
                env={**environ, **(variables or {}), _MARK: str(path)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> _Launch:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            for pid in self._alive():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        # A rank that outlived its launcher must not write any more when the next one begins.
        self._await(lambda: not self._alive(), "everything is gone")

    def output(self) -> str:
        """What all of it wrote."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def await_ranks(self) -> None:
        """Until every rank was started."""
        self._await(lambda: self._over() or len(self._ranks()) == self._count, "all ranks are there")

    def await_checkpoints(self, count: int) -> None:
        """Until so many more were written."""
        for _ in range(count):
            self._await_another(self._written())

    def kill(self, victim: int) -> None:
        """Kill a rank, the launcher, or all, with -9."""
        assert not self._over(), f"it ended before it was killed:\n{self.output()}"
        if victim == _ALL:
            for each in (self._process.pid, *self._alive()):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            return
        pid = self._process.pid if victim == _LAUNCHER else self._ranks().get(victim)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self) -> int:
        """The launcher's exit code."""
        return self._process.wait(_LIMIT_S)

    def _await(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while not holds():
            assert time.monotonic() < deadline, f"waited {_LIMIT_S} s until {what}:\n{self.output()}"
            time.sleep(0.005)

    def _await_another(self, seen: int) -> None:
        self._await(lambda: self._over() or self._written() != seen, "another checkpoint is there")

    def _over(self) -> bool:
        """Whether the launcher has ended: too soon, as `kill` then finds."""
        return self._process.poll() is not None

    def _written(self) -> int:
        """When the checkpoint was, in ns; 0: never yet."""
        return self._path.stat().st_mtime_ns if self._path.exists() else 0

    def _ranks(self) -> dict[int, int]:
        """The pids by rank."""
        pids = {}
        for pid in self._alive():
            with suppress(OSError):
                variables = dict(part.partition(b"=")[::2] for part in _read(pid, "environ"))
                limbs = _read(pid, "cmdline")
                number = next((variables[name] for name in _RANK if name in variables), None)
                if number is not None and b"bnworker.cli.started" in limbs and b"-n" not in limbs:
                    pids[int(number)] = pid
        return pids

    def _alive(self) -> list[int]:
        """All processes of this launch but the launcher; zombies are none."""
        numbers = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) != self._process.pid:
                with suppress(OSError):
                    if self._mark in _read(int(folder.name), "environ"):
                        numbers.append(int(folder.name))
        return numbers


def _read(pid: int, file: str) -> list[bytes]:
    return Path(f"/proc/{pid}/{file}").read_bytes().split(b"\0")
