"""Checkpoints: a job's layers as they were at a training step, each in a file of its own beside the job's.

A file is a whole snapshot, in the frames of a job's file: a header that says whose it is, what it is called and to
which step it belongs, then the layers. It is written aside, synced and renamed, so a name has one whole checkpoint or
none. The service reads none when it starts, and takes no job back to one by itself: an operator does.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

from bnlayer.state import LayerState
from bnproto.v1 import journal_pb2 as pb
from bnserver import state_directory
from bnserver.core.effects import Checkpoint
from bnserver.core.journal_records import LayerSnapshot
from bnserver.core.quotas import exceeded
from bnserver.job_file import SUFFIX, Scan, StoreError, file_name, first_header, header, scan
from bnserver.journal_encoding import encode, framed

CHECKPOINT_SUFFIX = ".checkpoint"

_NO_DIRECTORY = "The service has no state directory to keep checkpoints in: start it with --state-dir."

_log = logging.getLogger("bnserver")


class NotKeptError(RuntimeError):
    """A checkpoint is not kept, and what was there before is as it was; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint on disk.

    Attributes:
        path: where.
        job: whose.
        name: of the checkpoint.
        step: the training step that it belongs to.
        number: counts the checkpoints of a job, from 1.
        size: in bytes.
        written: seconds since 1970.
        fault: what is wrong with it; "" if it is sound.
        layers: the states in it, by layer; empty if they were not asked for, or it is damaged.
    """

    path: Path
    job: str
    name: str
    step: int = 0
    number: int = 0
    size: int = 0
    written: float = 0.0
    fault: str = ""
    layers: Mapping[str, LayerState] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "checkpoint": self.name,
            "step": self.step,
            "number": self.number,
            "file": self.path.name,
            "fault": self.fault or None,
            "bytes": self.size,
            "written": self.written,
            "layers": {name: {"version": state.version} for name, state in self.layers.items()},
        }


class Checkpoints:
    """Writes the checkpoints of all jobs.

    Args:
        directory: the state directory; None: there is none, and none is kept.
        most: that a job may have.
        keep: how many of a job's are kept, the latest ones; None: all.
    """

    def __init__(self, directory: Path | None, most: int, keep: int | None) -> None:
        self._directory = directory
        self._most = most
        self._keep = keep
        self._writing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def write(self, asked: Checkpoint) -> None:
        """Write one; it is on disk when this returns. One of the same name is replaced.

        Raises:
            NotKeptError: it could not be written, or the job has too many.
        """
        if self._directory is None:
            raise NotKeptError(_NO_DIRECTORY)
        if not asked.layers:
            raise NotKeptError(
                f"Job {asked.job!r} has no layers yet: a layer is known from its first training call on."
            )
        lock = self._writing.setdefault(asked.job, asyncio.Lock())
        async with lock:
            try:
                await asyncio.to_thread(self._write, self._directory, asked)
            except (OSError, StoreError) as error:
                raise NotKeptError(
                    f"Checkpoint {asked.name!r} of job {asked.job!r} could not be written: {str(error).rstrip('.')}. "
                    "The one before it, if there is one, is as it was."
                ) from error

    def _write(self, directory: Path, asked: Checkpoint) -> None:
        there = headers(directory, asked.job)
        others = [stored for stored in there if stored.name != asked.name]
        # With --keep-checkpoints the oldest ones make room; without, only an operator deletes any.
        left = len(others) if self._keep is None else min(len(others), self._keep - 1)
        if left >= self._most:
            raise NotKeptError(
                f"The service refused checkpoint {asked.name!r} of job {asked.job!r}: "
                f"{exceeded('checkpoints of a job', self._most, left + 1, '--max-checkpoints')}. With "
                "--keep-checkpoints it deletes the oldest ones by itself."
            )
        path = path_of(directory, asked.job, asked.name)
        number = 1 + max((stored.number for stored in there), default=0)
        records = [LayerSnapshot(name, state) for name, state in asked.layers.items()]
        first = header(
            asked.job,
            synced=len(records) + 1,
            directory=state_directory.identity(directory),
            number=number,
            checkpoint=asked.name,
            step=asked.step,
        )
        bodies = [first, *map(encode, records)]
        aside = path.with_suffix(".part")
        try:
            with os.fdopen(state_directory.create(aside), "wb") as file:
                file.write(b"".join(framed(number, body) for number, body in enumerate(bodies)))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise
        state_directory.sync(directory)
        if self._keep is not None:
            sound = sorted((stored for stored in others if not stored.fault), key=lambda stored: stored.number)
            for stored in sound[: max(0, len(sound) + 1 - self._keep)]:
                stored.path.unlink(missing_ok=True)
                _log.info("deleted checkpoint %r of job %r (--keep-checkpoints)", stored.name, asked.job)


def path_of(directory: Path, job: str, name: str) -> Path:
    """The file of a checkpoint."""
    return directory / f"{_stem(file_name(job))}.{name}{CHECKPOINT_SUFFIX}"


def headers(directory: Path, job: str) -> list[StoredCheckpoint]:
    """A job's checkpoints, the first ones first; without what is in them, which is not read.

    Raises:
        OSError: the directory can't be read.
    """
    stored = []
    for path, name in _files(directory, file_name(job)):
        try:
            stored.append(_from_header(path, job, name, first_header(path)))
        except StoreError as error:
            stored.append(StoredCheckpoint(path, job, name, fault=str(error)))
    return sorted(stored, key=lambda each: (each.number, each.name))


def look(directory: Path, job: str) -> list[StoredCheckpoint]:
    """A job's checkpoints, the first ones first, each read and checked.

    Raises:
        OSError: the directory can't be read.
    """
    stored = [_read(path, job, name) for path, name in _files(directory, file_name(job))]
    return sorted(stored, key=lambda each: (each.number, each.name))


def remove(directory: Path, job_file: str) -> int:
    """Delete all checkpoints of a job, given by the name of its file; returns how many there were.

    Raises:
        OSError: one can't be deleted.
    """
    files = list(_files(directory, job_file))
    for path, _ in files:
        path.unlink(missing_ok=True)
    return len(files)


def _files(directory: Path, job_file: str) -> Iterator[tuple[Path, str]]:
    """The files of a job's checkpoints, each with the checkpoint's name."""
    begin = f"{_stem(job_file)}."
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        if name.startswith(begin) and name.endswith(CHECKPOINT_SUFFIX):
            yield directory / name, name.removeprefix(begin).removesuffix(CHECKPOINT_SUFFIX)


def _stem(job_file: str) -> str:
    return job_file.removesuffix(SUFFIX)


def _read(path: Path, job: str, name: str) -> StoredCheckpoint:
    try:
        scanned: Scan = scan(path)
        stored = _from_header(path, job, name, scanned.header)
        records = scanned.records()
    except StoreError as error:
        return StoredCheckpoint(path, job, name, fault=str(error))
    layers = {record.layer: record.state for record in records if isinstance(record, LayerSnapshot)}
    return StoredCheckpoint(path, job, name, stored.step, stored.number, stored.size, stored.written, layers=layers)


def _from_header(path: Path, job: str, name: str, head: pb.Header) -> StoredCheckpoint:
    if (head.job, head.checkpoint) != (job, name):
        what = f"checkpoint {head.checkpoint!r}" if head.checkpoint else "no checkpoint, but a file"
        raise StoreError(f"{path} holds {what} of job {head.job!r}, expected {name!r} of job {job!r}: move it away.")
    status = path.stat()
    return StoredCheckpoint(path, job, name, head.step, head.number, status.st_size, status.st_mtime)
