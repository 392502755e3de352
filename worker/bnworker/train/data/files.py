"""Files that must not change while a run reads them.

A file is opened for each read, read at given offsets, and closed. Memory mapping would be simpler, but if a mapped file
is truncated, the process ends with SIGBUS, and mapped pages count as the process's memory; keeping a thousand shards
open could exceed the limit of open files. Every read compares the file's inode, size and modification time with those
at the start of the run.

Reading rows in random order one by one is slow on a disk without cached pages; the rows of the next step are prefetched
while the current step computes (posix_fadvise).
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
        signature: at the start; it must be the same at every read.
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
        """A descriptor for reading; the data is valid if the block ends without an error.

        Raises:
            DataError: the file cannot be opened or read, or was changed.
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
            self._compare(descriptor)  # a file that was changed also looks damaged: report the cause
            raise
        finally:
            os.close(descriptor)

    def soon(self, spans: Iterable[tuple[int, int]]) -> None:
        """Let the system prefetch parts of the file, each (offset, size); returns at once.

        Errors are ignored: the read itself reports them.
        """
        with suppress(OSError):
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for offset, size in spans:
                    os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def unchanged(self) -> None:
        """Check that the file was not changed since the start.

        Raises:
            DataError: it was.
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
    """Fill a buffer from an offset in a file.

    Raises:
        DataError: the file ends before the buffer is full.
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
