"""The service as a child process that is killed and started again on the same port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO

_START_S = 100.0  # to listen; promises are measured, this only ends a test that hangs


class Daemon:
    """`python -m bnserver`, with a state directory that outlives it.

    Args:
        folder: of its state and its log.
        options: of its command line, beside the address and the state directory.
        state: the state directory, if it is elsewhere.

    Attributes:
        address: HOST:PORT; the port is chosen by the kernel at the first start, and kept.
        state: the state directory.
        log: what it wrote to stderr, over all starts.
    """

    def __init__(self, folder: Path, options: Sequence[str] = (), state: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.address = "127.0.0.1:0"
        self.state = state or folder / "state"
        self.log = folder / "service.err"
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self._logger = Thread()
        self._lines: SimpleQueue[tuple[float, str]] = SimpleQueue()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def stopped(self) -> bool:
        """Whether it was stopped by a signal."""
        return Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "T"

    def begin(self, environ: Mapping[str, str] | None = None) -> None:
        """Start the process, and don't wait until it listens.

        Args:
            environ: variables beside this process's.
        """
        assert not self.alive
        command = [sys.executable, "-m", "bnserver", "--listen", self.address, "--state-dir", str(self.state)]
        self._lines = SimpleQueue()
        self._process = subprocess.Popen(
            [*command, *self._options],
            env={**os.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        # Through pipes: what limits the size of its files must not limit what it says.
        Thread(target=_expect, args=(self._process.stdout, self._lines), name="daemon-out", daemon=True).start()
        self._logger = Thread(target=_log, args=(self._process.stderr, self.log), name="daemon-err", daemon=True)
        self._logger.start()

    def listens(self) -> float:
        """Wait until ranks can join; returns when that was said, on the monotonic clock."""
        try:
            when, line = self._lines.get(timeout=_START_S)
        except Empty:
            raise AssertionError(f"the service did not listen within {_START_S} s: {self.output()}") from None
        assert line.startswith("bnserver listening on "), (line, self.output())
        self.address = line.split()[-1]
        return when

    def start(self, environ: Mapping[str, str] | None = None) -> float:
        """Start it, and wait until ranks can join; returns when that was said."""
        self.begin(environ)
        return self.listens()

    def signal(self, number: int) -> float:
        """Send it a signal; returns when."""
        assert self._process is not None
        self._process.send_signal(number)
        return time.monotonic()

    def kill(self) -> float:
        """Kill it with -9, and wait until it is gone; returns when it was killed."""
        when = self.signal(signal.SIGKILL)
        self.wait()
        return when

    def wait(self, within: float = _START_S) -> int:
        """Its exit code, once it ends."""
        assert self._process is not None
        code = self._process.wait(within)
        self._logger.join()
        return code

    def output(self) -> str:
        """The end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-4000:] if self.log.exists() else ""


def _expect(out: IO[str], lines: SimpleQueue[tuple[float, str]]) -> None:
    with out:
        for line in out:
            lines.put((time.monotonic(), line.strip()))
    lines.put((time.monotonic(), ""))


def _log(errors: IO[str], path: Path) -> None:
    with errors, path.open("a", encoding="utf-8") as file:
        for line in errors:
            file.write(line)
            file.flush()


@contextmanager
def daemon(folder: Path, *options: str) -> Iterator[Daemon]:
    """A service that listens, and is gone after the block."""
    service = Daemon(folder, options)
    try:
        service.start()
        yield service
    finally:
        if service.alive:
            service.signal(signal.SIGCONT)
            service.kill()
