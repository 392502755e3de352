"""Workers as child processes: told what to do, listened to, killed, and gone in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self

from support.fault.worker import Part

_TESTS = Path(__file__).parents[2]
_KERNELS = {"BNLAYER_KERNELS": "reference"}  # the same bits, and no compiler to be loaded by every process
LIMIT_S = 120.0  # for what must come; promises are measured, this only ends a test that hangs


class Rank:
    """A worker.

    Args:
        errors: the file that its stderr goes to.
    """

    def __init__(self, errors: Path) -> None:
        self._errors = errors
        path = os.pathsep.join(filter(None, (str(_TESTS), os.environ.get("PYTHONPATH"))))
        with errors.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.fault.worker"],
                env={**os.environ, **_KERNELS, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.pid = self._process.pid
        self._answers: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._reader = Thread(target=self._read, name="rank-reader", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def play(self, part: Part) -> None:
        """Give it its part."""
        self.go_on(part.line())

    def go_on(self, word: object = "") -> None:
        """Let it go on where it paused or stopped."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def expect(self, *expected: str, within: float = LIMIT_S) -> dict[str, Any]:
        """Its next answer, which must be one of those expected."""
        try:
            answer = self._answers.get(timeout=within)
        except Empty:
            raise AssertionError(f"pid {self.pid} said nothing for {within:g} s, expected {expected}") from None
        assert answer["at"] in expected, f"expected {expected}, heard {answer}; {self.output()}"
        return answer

    @property
    def has_output(self) -> bool:
        """Whether it has said something that nobody has heard."""
        return not self._answers.empty()

    def expect_any(self) -> dict[str, Any]:
        """Its next answer, whatever it is."""
        return self._answers.get(timeout=LIMIT_S)

    def signal(self, number: int) -> float:
        """Send it a signal; returns when, on the monotonic clock."""
        self._process.send_signal(number)
        return time.monotonic()

    def end(self) -> None:
        """Kill it, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it did not read any more
                pipe.close()

    def output(self) -> str:
        """What it wrote to stderr."""
        return self._errors.read_text(encoding="utf-8", errors="replace")[-4000:]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put({"at": "ended"})


@contextmanager
def ranks(count: int, folder: Path) -> Iterator[list[Rank]]:
    """So many workers, ready, and gone after the block."""
    folder.mkdir(parents=True, exist_ok=True)
    started: list[Rank] = []
    try:
        started.extend(Rank(folder / f"{number}.err") for number in range(count))
        for rank in started:
            rank.expect("ready")
        yield started
    finally:
        end(started)


def end(started: Sequence[Rank]) -> None:
    """Kill them all, and then wait."""
    for rank in started:
        with suppress(ProcessLookupError):
            rank.signal(signal.SIGKILL)
    for rank in started:
        rank.end()
