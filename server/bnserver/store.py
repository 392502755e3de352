"""Persistence of jobs between two runs of the service: a directory with one file per job.

What is in a file, and how it is read back, is said in `job_file`.

Laws:
1. A record is in the kernel's page cache when `append` returns: it survives the end of the process, however it ends.
   It is not synced: a power cut may lose it.
2. A snapshot replaces the file as a whole or not at all: written aside, synced, renamed, the directory synced. It
   survives a power cut. What was appended meanwhile is appended to it before it replaces the file.
3. One daemon at a time: the directory is locked for as long as the daemon lives.
4. After a record could not be encoded or written, nothing is appended to that job until a whole snapshot of it is on
   disk.
5. A job that is over and saved exists only as its file: nothing of it is kept in memory, and its file is not written
   again. When the service starts, the checksums of such a file are verified, and its arrays are not loaded.
6. One file per job, named after it. A copy beside it is refused: it might take the job back in time.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from bnserver import checkpoints, state_directory
from bnserver.core.journal_records import JournalRecord
from bnserver.failpoints import Failpoints
from bnserver.job_file import SUFFIX, JobFile, Scan, StoreError, file_name, header, scan, write_all
from bnserver.journal_encoding import encode, framed, is_over

_ASIDE = ".part"
# A journal of so many records, or bytes, is replaced by a snapshot: reading it back takes about a second.
_LONG_RECORDS, _LONG_BYTES = 2**12, 2**26
# Snapshots that are written side by side: the disk syncs them together, and a long one holds up no other job's.
_SAVES_AT_ONCE = 4

_log = logging.getLogger("bnserver")


class Store:
    """A locked state directory.

    Args:
        directory: is made if it does not exist.
        failpoints: faults to inject.
        long_records, long_bytes: how long a journal may become.

    Raises:
        StoreError: another daemon uses it, or it can't be written to.
    """

    def __init__(
        self,
        directory: Path,
        failpoints: Failpoints | None = None,
        *,
        long_records: int = _LONG_RECORDS,
        long_bytes: int = _LONG_BYTES,
    ) -> None:
        self._directory = directory
        self._failpoints = failpoints or Failpoints()
        self._long_records, self._long_bytes = long_records, long_bytes
        self._files: dict[str, JobFile] = {}
        self._saves = asyncio.Semaphore(_SAVES_AT_ONCE)
        self._lock = state_directory.lock(directory)
        try:
            self._identity = state_directory.identity(directory)
        except (OSError, StoreError) as error:
            self._lock.close()
            raise StoreError(f"The state directory {directory} can't be used: {error}") from error

    def load(self, *, finished: bool = True) -> dict[str, list[JournalRecord]]:
        """The records of every saved job.

        Args:
            finished: whether to include jobs that are over and saved; `read` gives one of these on demand.

        Raises:
            StoreError: a file is corrupt, or not the one that its name says; or a job has two.
        """
        journals, scans, foreign = {}, list[Scan](), list[Scan]()
        for path in state_directory.job_files(self._directory):
            file = scan(path)
            if finished or file.journal or not (file.snapshot and is_over(file.bodies)):
                journals[file.job] = file.records()
            file.bodies.clear()
            scans.append(file)
            if file.header.directory not in ("", self._identity):
                foreign.append(file)
        state_directory.refuse_copies(scans)
        for file in scans:
            state_directory.close_to_others(file)
            kept = file.mend()
            if file.job in journals:
                self._files[file.job] = kept
        if foreign:
            text = "%d files in %s were written in another state directory, e.g. %s of job %r: they are taken over"
            _log.warning(text, len(foreign), self._directory, foreign[0].path.name, foreign[0].job)
        return journals

    def holds(self, job: str) -> bool:
        """Whether there is a file of a job."""
        return self.path(job).exists()

    def read(self, job: str) -> list[JournalRecord]:
        """The records of one saved job.

        Raises:
            StoreError: its file is corrupt, or another job's.
        """
        file = scan(self.path(job))
        if file.job != job:
            raise StoreError(
                f"{file.path} holds job {file.job!r}, expected job {job!r}: put the right file in its place."
            )
        records, self._files[job] = file.records(), file.mend()
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
        """A job's file."""
        return self._directory / file_name(job)

    def last_written(self) -> dict[str, float]:
        """The names of all jobs' files, and when each was last written, in seconds since 1970."""
        written = {}
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX) and entry.is_file():
                    with suppress(FileNotFoundError):
                        written[entry.name] = entry.stat().st_mtime
        return written

    def delete(self, name: str) -> None:
        """Delete a job's file, by its name, and its checkpoints."""
        (self._directory / name).unlink(missing_ok=True)
        checkpoints.remove(self._directory, name)

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self._directory

    def append(self, job: str, record: JournalRecord) -> None:
        """Append a record to a job's journal; it survives the end of this process once this returns.

        Raises:
            StoreError: it could not be written; the job must be saved as a whole.
        """
        self._failpoints.reached("before-journal")
        file = self._files.setdefault(job, JobFile())
        try:
            body = encode(record)
        except Exception as error:  # whatever it is, no record may follow this gap
            file.broken, file.lost = True, self._store_error(job, error)
            raise file.lost from error
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
        file = self._files.get(job)
        if file is None:
            return False
        long = file.records >= self._long_records or file.size - file.snapshot >= self._long_bytes
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
        async with file.writing, self._saves:
            try:
                file.meanwhile, file.lost = [], None
                taken, path = tuple(records()), self.path(job)
                aside = path.with_suffix(_ASIDE)
                count, size = await asyncio.to_thread(self._write_aside, job, aside, taken, file.number + 1)
                if file.lost is not None:
                    raise file.lost
                self._take_place(file, aside, path, count, size)
                await asyncio.to_thread(state_directory.sync, self._directory)
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
            first = framed(0, header(job, synced=0, directory=self._identity))
            aside = path.with_suffix(_ASIDE)
            with os.fdopen(state_directory.create(aside), "wb") as target:
                target.write(first)
            aside.replace(path)
            file.frames, file.size = 1, len(first)
        # Without O_NONBLOCK a pipe that somebody put there would hold up everybody.
        file.handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK)

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

    def _write_aside(self, job: str, aside: Path, records: tuple[JournalRecord, ...], number: int) -> tuple[int, int]:
        """Write a snapshot beside the file, and sync it; returns its frames and bytes."""
        first = header(job, synced=len(records) + 1, directory=self._identity, number=number)
        bodies = [first, *map(encode, records)]
        data = b"".join(framed(number, body) for number, body in enumerate(bodies))
        half = len(data) // 2
        with os.fdopen(state_directory.create(aside), "wb") as target:
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
        file.number += 1
        self._failpoints.reached("after-rename")

    def _store_error(self, job: str, error: Exception) -> StoreError:
        what = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return StoreError(f"Job {job!r} could not be saved to {self.path(job)}: {what}.")
