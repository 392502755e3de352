"""Persistence of jobs between two runs of the service: a directory with one file per job.

What is in a file, and how it is read back, is said in `job_file`.

Laws:
1. A record is in the kernel's page cache when `append` returns: it survives the end of the process, however it ends.
   It is not synced: a power cut may lose it.
2. A snapshot replaces the file as a whole or not at all: written aside, synced, renamed, the directory synced. It
   survives a power cut. What was appended meanwhile is appended to it before it replaces the file.
3. One daemon at a time: the directory is locked for as long as the daemon lives.
4. After a record could not be written, nothing is appended to that job until a whole snapshot of it is on disk.
5. A job that is over and saved exists only as its file: nothing of it is kept in memory, and its file is not written
   again. When the service starts, the checksums of such a file are verified, and its arrays are not loaded.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO
from urllib.parse import quote

from bnserver.core.journal_records import JournalRecord
from bnserver.failpoints import Failpoints
from bnserver.job_file import JobFile, StoreError, decoded, header, loaded, scanned, write_all
from bnserver.journal_encoding import encode, framed, is_over

_SUFFIX = ".job"
_ASIDE = ".part"
# A journal of so many records, or bytes, is replaced by a snapshot: reading it back takes about a second.
_LONG_ENTRIES, _LONG_BYTES = 2**12, 2**26

_log = logging.getLogger("bnserver")


class Store:
    """A locked state directory.

    Args:
        directory: is made if it does not exist.
        failpoints: faults to inject.
        long_entries, long_bytes: how long a journal may become.

    Raises:
        StoreError: another daemon uses it, or it can't be written to.
    """

    def __init__(
        self,
        directory: Path,
        failpoints: Failpoints | None = None,
        *,
        long_entries: int = _LONG_ENTRIES,
        long_bytes: int = _LONG_BYTES,
    ) -> None:
        self._directory = directory
        self._failpoints = failpoints or Failpoints()
        self._long_entries, self._long_bytes = long_entries, long_bytes
        self._files: dict[str, JobFile] = {}
        self._writing = asyncio.Lock()
        self._lock = _locked(directory)

    def load(self, *, finished: bool = True) -> dict[str, list[JournalRecord]]:
        """The records of every saved job.

        Args:
            finished: whether to include jobs that are over and saved; `read` gives one of these on demand.

        Raises:
            StoreError: a file is corrupt.
        """
        journals = {}
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            job, bodies, file = scanned(path)
            if finished or not (file.is_snapshot and is_over(bodies)):
                journals[job], self._files[job] = decoded(path, bodies), file
        return journals

    def holds(self, job: str) -> bool:
        """Whether there is a file of a job."""
        return self.path(job).exists()

    def read(self, job: str) -> list[JournalRecord]:
        """The records of one saved job.

        Raises:
            StoreError: its file is corrupt.
        """
        _, records, self._files[job] = loaded(self.path(job))
        return records

    def is_saved(self, job: str) -> bool:
        """Whether a job's file is a snapshot on disk, and nothing came after it."""
        file = self._files.get(job)
        return file is not None and file.is_snapshot and not file.broken and file.meanwhile is None

    def release(self, job: str) -> None:
        """Drop everything about a saved job but its file."""
        file = self._files.pop(job, None)
        if file is not None:
            file.close()

    def path(self, job: str) -> Path:
        """A job's file: a readable, valid file name that is unique to the job."""
        digest = blake2b(job.encode(), digest_size=8).hexdigest()
        return self._directory / f"{quote(job[:80], safe='')[:80]}.{digest}{_SUFFIX}"

    def append(self, job: str, record: JournalRecord) -> None:
        """Append a record to a job's journal; it survives the end of this process once this returns.

        Raises:
            StoreError: it could not be written; the job must be saved as a whole.
        """
        self._failpoints.reached("before-journal")
        file = self._files.setdefault(job, JobFile())
        body = encode(record)
        if file.meanwhile is not None:
            file.meanwhile.append(body)
        if file.broken:
            return  # a snapshot will hold this too
        try:
            self._open(job, file)
            self._write(file, body)
        except OSError as error:
            file.broken = True
            with suppress(OSError):
                os.truncate(self.path(job), file.size)  # remove a partly written record
            file.close()
            raise self._store_error(job, error) from error
        self._failpoints.reached("after-journal")

    def long(self, job: str) -> bool:
        """Whether a job's journal has become so long that a snapshot should replace it."""
        file = self._files[job]
        long = file.records >= self._long_entries or file.size - file.snapshot >= self._long_bytes
        return long and file.meanwhile is None and not file.broken

    async def save(self, job: str, records: Callable[[], Sequence[JournalRecord]]) -> None:
        """Replace a job's file by a snapshot; it is on disk when this returns.

        Args:
            job: the job's name.
            records: returns its records; called once, when the snapshot is taken.

        Raises:
            StoreError: it could not be written. The file is as it was before.
        """
        file = self._files.setdefault(job, JobFile())
        async with self._writing:
            file.meanwhile, taken = [], tuple(records())
            path = self.path(job)
            aside = path.with_suffix(_ASIDE)
            try:
                count, size = await asyncio.to_thread(self._write_aside, job, aside, taken)
                self._take_place(file, aside, path, count, size)
                await asyncio.to_thread(_sync, self._directory)
            except OSError as error:
                raise self._store_error(job, error) from error
            finally:
                file.meanwhile = None

    def close(self) -> None:
        """Let another daemon use the directory."""
        for file in self._files.values():
            file.close()
        self._lock.close()

    def _open(self, job: str, file: JobFile) -> None:
        """Open the file for appending. A new file is created with its header in it."""
        if file.handle is not None:
            return
        path = self.path(job)
        if not file.frames:
            first = framed(0, header(job, synced=0))
            aside = path.with_suffix(_ASIDE)
            aside.write_bytes(first)
            aside.replace(path)
            file.frames, file.size = 1, len(first)
        file.handle = os.open(path, os.O_WRONLY | os.O_APPEND)

    def _write(self, file: JobFile, body: bytes) -> None:
        assert file.handle is not None
        frame = framed(file.frames, body)
        if self._failpoints.armed("in-journal"):
            half = len(frame) // 2
            os.write(file.handle, frame[:half])
            self._failpoints.reached("in-journal")
            write_all(file.handle, frame[half:])
        else:
            write_all(file.handle, frame)
        file.frames += 1
        file.records += 1
        file.size += len(frame)

    def _write_aside(self, job: str, aside: Path, records: tuple[JournalRecord, ...]) -> tuple[int, int]:
        """Write a snapshot beside the file, and sync it; returns its frames and bytes."""
        bodies = [header(job, synced=len(records) + 1), *map(encode, records)]
        data = b"".join(framed(number, body) for number, body in enumerate(bodies))
        half = len(data) // 2
        with aside.open("wb") as target:
            target.write(data[:half])
            if self._failpoints.armed("in-snapshot"):
                target.flush()
                self._failpoints.reached("in-snapshot")
            target.write(data[half:])
            target.flush()
            os.fsync(target.fileno())
        self._failpoints.reached("before-rename")
        return len(bodies), len(data)

    def _take_place(self, file: JobFile, aside: Path, path: Path, count: int, size: int) -> None:
        """Append what came meanwhile, and rename the snapshot to the job's file, with no other append in between."""
        fresh = JobFile(os.open(aside, os.O_WRONLY | os.O_APPEND), count, size, snapshot=size)
        try:
            for body in file.meanwhile or ():
                self._write(fresh, body)
            aside.replace(path)
        finally:
            fresh.close()
        file.close()
        file.meanwhile, file.broken = None, False
        file.frames, file.size, file.records, file.snapshot = fresh.frames, fresh.size, fresh.records, fresh.snapshot
        self._failpoints.reached("after-rename")

    def _store_error(self, job: str, error: OSError) -> StoreError:
        return StoreError(f"Job {job!r} could not be saved to {self.path(job)}: {error}.")


def _locked(directory: Path) -> IO[str]:
    path = directory / "lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"The state directory {directory} can't be used: {error}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise StoreError(
            f"The state directory {directory} is in use by {holder}. Stop that daemon, or give this one another "
            "--state-dir: two owners of the same statistics would overwrite each other."
        ) from None
    try:
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on host {socket.gethostname()}\n")
        lock.flush()
    except OSError as error:  # the disk is full: the lock holds all the same
        _log.warning("The state directory %s can't be written to: %s.", directory, error)
    return lock


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
