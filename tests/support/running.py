"""A launch under way: what it says as it comes, and what of it still runs.

Everything that a launch starts, guardian and mpiexec's helpers included, inherits a variable of the test's own: what is
left running is who still carries it.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from bnworker.launcher import guardian
from support.processes import arguments, children

_LIMIT_S = 120.0  # what is waited for comes within a second or two; this is for a machine that does other things
_MARK = "LAUNCH_UNDER_TEST"


class _Text:
    """What comes through a pipe, read as it comes; `hangs_up` closes the pipe after the first line."""

    def __init__(self, pipe: IO[bytes], *, hangs_up: bool) -> None:
        self._pipe = pipe
        self._hangs_up = hangs_up
        self._come = threading.Condition()
        self._text = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._pipe:
            while chunk := os.read(self._pipe.fileno(), 2**16):
                with self._come:
                    self._text += chunk
                    self._come.notify_all()
                if self._hangs_up and b"\n" in self._text:
                    return

    def until(self, pattern: str, count: int = 1) -> list[re.Match[str]]:
        """Wait until a pattern has come so many times."""

        def matches() -> list[re.Match[str]]:
            return list(re.finditer(pattern, self._text.decode(errors="replace"), re.MULTILINE))

        with self._come:
            assert self._come.wait_for(lambda: len(matches()) >= count, _LIMIT_S), self._text
            return matches()

    def so_far(self) -> str:
        """What has come until now."""
        with self._come:
            return self._text.decode(errors="replace")

    def all(self) -> str:
        """Everything, once the pipe has ended."""
        self._thread.join(_LIMIT_S)
        assert not self._thread.is_alive()
        return self._text.decode()


class Running:
    """A launch under way.

    Args:
        ranks: how many.
        command: what each of them runs; it finds the log folder in LOGS.
        options: of the launcher.
        logs: the log folder.
        hangs_up: whether its stdout is closed after the first line.
        prefix: what stands before the launcher's command.

    Attributes:
        temporary: where it and all that it starts keep their temporary files.
    """

    def __init__(
        self,
        ranks: int,
        command: Sequence[str],
        options: Sequence[str],
        logs: Path,
        *,
        hangs_up: bool = False,
        prefix: Sequence[str] = (),
    ) -> None:
        mark = secrets.token_hex(8)
        self._mark = f"{_MARK}={mark}".encode()
        environ = {name: value for name, value in os.environ.items() if not name.startswith("BNLAYER_")}
        self.temporary = Path(f"{logs}.tmp")
        self.temporary.mkdir()
        self.ranks = ranks
        self.process = subprocess.Popen(
            # A test run under nohup hands down an ignored SIGHUP, which a launcher would respect.
            [
                *prefix,
                "env",
                "--default-signal=HUP",
                *arguments(ranks, *command, options=[*options, f"--log-dir={logs}"]),
            ],
            env={**environ, _MARK: mark, "LOGS": str(logs), "TMPDIR": str(self.temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.out = _Text(self.process.stdout, hangs_up=hangs_up)
        self.err = _Text(self.process.stderr, hangs_up=False)

    def ready(self) -> dict[int, int]:
        """Wait for all ranks; returns rank: pid."""
        lines = self.out.until(r"^\[(?:\w+:)?(\d+)\] ready (\d+) .*$", self.ranks)
        return {int(line[1]): int(line[2]) for line in lines}

    def job_folder(self) -> Path:
        """The launcher's temporary folder."""
        return Path(self.out.until(r"^\[0\] ready \d+ (.*)$")[0][1])

    def signal(self, number: int) -> None:
        """Send the launcher a signal."""
        self.process.send_signal(number)

    def guardian(self) -> int:
        """The pid of the launcher's guardian."""
        (child,) = (pid for pid in children(self.process.pid) if _is_guardian(pid))
        return child

    def backbone(self) -> int:
        """The pid of what the ranks can't live without: of service or mpiexec."""
        ranks = self.ready().values()
        (launcher,) = (pid for pid in children(self.process.pid) if not _is_guardian(pid) and pid not in ranks)
        return launcher

    def carriers(self) -> list[str]:
        """The command lines of everything that still runs."""
        return [command for entry in Path("/proc").glob("[0-9]*") if (command := self._carrier(entry))]

    def _carrier(self, entry: Path) -> str:
        try:
            if self._mark in (entry / "environ").read_bytes().split(b"\0"):
                return f"{entry.name}: " + (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            pass
        return ""

    def end(self) -> int:
        """Wait for the launcher's end; returns its code as a shell says it."""
        status = self.process.wait(_LIMIT_S)
        return status if status >= 0 else 128 - status

    def clean_up(self) -> None:
        """Kill what a failed test leaves behind."""
        self.process.kill()
        self.process.wait()
        for line in self.carriers():
            with suppress(ProcessLookupError):
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)


def _is_guardian(pid: int) -> bool:
    return guardian.__file__ in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
