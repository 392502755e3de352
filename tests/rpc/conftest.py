"""Daemons and ranks as processes of their own, gone after each test."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from support.training import FIFTY_STEPS, Trained, trained


@pytest.fixture(scope="session")
def fifty_steps_alone(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Of a single process: what any number of workers is compared with."""
    return trained(tmp_path_factory.mktemp("alone"), "--transport=none", *FIFTY_STEPS)


@dataclass
class Process:
    """A child, its output read as text."""

    popen: subprocess.Popen[str]
    address: str = ""

    def line(self) -> str:
        """The next line that it prints."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.popen.send_signal(number)

    def end(self, number: int | None = None, within: float = 150.0) -> tuple[int, str, str]:
        """Let it end; returns its exit code and the rest of what it said on stdout and stderr."""
        if number is not None:
            self.popen.send_signal(number)
        out, err = self.popen.communicate(timeout=within)
        return self.popen.returncode, out, err


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python with arguments; whatever still runs after the test is killed."""
    children: list[subprocess.Popen[str]] = []

    def starter(*arguments: str) -> Process:
        command = [sys.executable, *arguments]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        children.append(child)
        return Process(child)

    yield starter
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGCONT)
            child.kill()
        child.communicate()


@pytest.fixture
def serve(start: Start) -> Start:
    """Starts a daemon on a free port, and waits until it listens."""

    def server(*arguments: str) -> Process:
        process = start("-m", "bnserver", "--listen", "127.0.0.1:0", *arguments)
        line = process.line()
        assert line.startswith("bnserver listening on 127.0.0.1:"), (line, process.end(signal.SIGKILL))
        process.address = line.rpartition(" ")[2]
        return process

    return server


_RANK = """
import sys, time
import numpy as np
from bnlayer import BatchNormalization, CollectiveError
from bnlayer.collective import Call, ExchangeKey, Operation, PlainSignature
from bnworker import World
from bnworker.transports.service import ServiceTransport

address, rank, world_size, timeout = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
say = lambda *words: print(*words, flush=True)
try:
    world = World(ServiceTransport(address, "job", rank, world_size, timeout=timeout), install=False)
    say("joined")
    BODY
    world.leave()
    say("left")
except CollectiveError as error:
    say(type(error).__name__, list(error.ranks), error.layer, error.step, error)
"""


@pytest.fixture
def run_rank(start: Start) -> Start:
    """Starts a process that joins job "job" and runs some lines as `world`; it says what it was told."""

    def runner(address: str, rank: int, world_size: int, body: str, timeout: float = 60.0) -> Process:
        lines = "\n    ".join(body.strip().splitlines())
        code = _RANK.replace("BODY", lines)
        return start("-c", code, address, str(rank), str(world_size), str(timeout))

    return runner
