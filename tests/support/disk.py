"""A disk that is full, in two ways that the kernel itself enforces, one of which needs no privilege.

"mount" is a file system of 1 MiB, which is filled up: ENOSPC. Where this machine does not let us mount one, and under
"limit", no file may grow beyond a size (RLIMIT_FSIZE): EFBIG.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WAYS = ("mount", "limit")

_LIMITED = (
    "import os, resource, sys\n"
    "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), hard))\n"
    "os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True)
class Disk:
    """Where files can be written until it is full.

    Attributes:
        folder: on it.
        mounted: whether it is a file system of its own.
    """

    folder: Path
    mounted: bool

    @property
    def error(self) -> str:
        """What the kernel says when it is full."""
        return "No space left on device" if self.mounted else "File too large"

    @property
    def files(self) -> list[str]:
        """What others wrote there."""
        return sorted(entry.name for entry in self.folder.iterdir() if entry != self._others)

    @property
    def _others(self) -> Path:
        return self.folder / "others"

    def command(self, room: int, *arguments: str | Path) -> Sequence[str | Path]:
        """A command for which a file of more than `room` bytes does not fit."""
        if self.mounted:
            self.fill(0, room)
            return arguments
        return (sys.executable, "-c", _LIMITED, str(room), *arguments)

    def fill(self, pid: int, room: int, largest: int = 0) -> None:
        """Leave so many bytes on the disk.

        Args:
            pid: of the process for which it is full, if it is so by a limit.
            room: bytes that are left.
            largest: the size of the largest file, which may grow by as much; it is the limit that counts from there.
        """
        if not self.mounted:
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest + room, hard))
            return
        with self._others.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                file.truncate(max(0, file.tell() - room))

    def free(self, pid: int | None) -> None:
        """Make room again; None: the process has ended, and its limit with it."""
        if self.mounted:
            self._others.unlink()
        elif pid is not None:
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def disk(folder: Path, way: str) -> Iterator[Disk]:
    """A disk that can be filled, gone after the block."""
    folder.mkdir()
    if way == "mount":
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            try:
                yield Disk(folder, mounted=True)
            finally:
                subprocess.run(["umount", folder], check=True)
            return
    yield Disk(folder, mounted=False)
