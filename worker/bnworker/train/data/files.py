"""Files that must stay as they are while a run reads them.

A file is opened for each read, read at given places, and closed. Mapped memory would be simpler, but a file that is
cut short under a mapping ends the process with SIGBUS, and its pages count as this process's memory; a thousand
shards kept open would be too many open files. Every read compares what the file is with what it was at first: its
inode, size and time of modification.

Rows in random order are slow on a cold disk one by one, and fast together: those of the next step are announced to
the system while this step computes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bnworker.train.data.problem import DataError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, slots=True)
class Signature:
    """The properties by which a changed file is recognized."""

    device: int
    inode: int
    size: int
    modified_ns: int

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.modified_ns / 1e9, UTC).isoformat(" ", "milliseconds")
        return f"{self.size:,} bytes, modified {when}, inode {self.inode}"


@dataclass(frozen=True, slots=True)
class File:
    """A regular file, as it was when the run began.

    Attributes:
        path: as given.
        signature: what it must still be at every read.
    """

    path: Path
    signature: Signature

    @classmethod
    def at(cls, path: Path) -> File:
        """Look at a file without opening it.

        Raises:
            DataError: it is missing, or no regular file.
        """
        return cls(path, _signature(path, path))

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor for reading; what was read inside the block is valid once the block has ended.

        Raises:
            DataError: the file cannot be opened or read, or it is not what it was.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _cannot(self.path, error) from None
        try:
            yield descriptor
            self._compare(descriptor)
        except OSError as error:
            raise _cannot(self.path, error) from None
        except DataError:
            self._compare(descriptor)  # a file that changes looks damaged as well: name the cause
            raise
        finally:
            os.close(descriptor)

    def soon(self, spans: Iterable[tuple[int, int]]) -> None:
        """Let the system fetch parts of the file, each (offset, size), that will be read soon; it waits for nothing.

        What is wrong with the file is found when they are read.
        """
        with suppress(OSError):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for offset, size in spans:
                    os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def unchanged(self) -> None:
        """Look whether the file is still what it was.

        Raises:
            DataError: it is not.
        """
        self._compare(self.path)

    def _compare(self, location: int | Path) -> None:
        signature = _signature(location, self.path)
        if signature != self.signature:
            raise DataError(
                f"{self.path}: the file changed while the run used it: it was {self.signature}; it is {signature}. "
                "Start again, with files that nobody writes to."
            )


def read_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer from a place in a file.

    Raises:
        DataError: the file ends before.
    """
    while buffer:
        got = os.preadv(descriptor, [buffer], offset)
        if not got:
            raise DataError(f"{path}: the file is cut short: it ends at byte {offset:,}, in the middle of an array.")
        buffer, offset = buffer[got:], offset + got


def _signature(location: int | Path, path: Path) -> Signature:
    try:
        status = os.fstat(location) if isinstance(location, int) else location.stat()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise DataError(f"{path}: cannot be read: it is a link to {path.readlink()}, which is not there.") from None
        raise _cannot(path, error) from None
    except OSError as error:
        raise _cannot(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: expected a file, found {_KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}.")
    return Signature(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _cannot(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror or error}.")
