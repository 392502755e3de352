"""One job's file in the state directory: what is in it, and how it is read back.

A file is a snapshot, followed by the journal of what came after it: both are journal records, in the same frames. What
is loaded is what was written: checksums cover every byte. A torn last record is cut off, because no answer that depends
on it was sent. Anything else that is wrong is reported, never skipped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bnproto.v1 import journal_pb2 as pb
from bnserver.core.journal_records import JournalRecord
from bnserver.journal_encoding import FrameError, RecordError, Torn, decode, encode_header, frames

_FORMAT = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger("bnserver")


class StoreError(RuntimeError):
    """The state directory can't be used; the text gives the reason, and what to do."""


@dataclass(slots=True)
class JobFile:
    """A job's file.

    Attributes:
        handle: its descriptor, open for appending; None: nothing was appended lately.
        frames: in it so far.
        size: its bytes so far.
        records: appended since the snapshot.
        snapshot: bytes of it.
        broken: whether it lacks a record, so that it must be replaced.
        meanwhile: what was appended while a snapshot is being written; None while none is.
    """

    handle: int | None = None
    frames: int = 0
    size: int = 0
    records: int = 0
    snapshot: int = 0
    broken: bool = False
    meanwhile: list[bytes] | None = None

    @property
    def is_snapshot(self) -> bool:
        """Whether it holds a snapshot and nothing else."""
        return self.snapshot > 0 and not self.records

    def close(self) -> None:
        """Close the descriptor; it is opened again when it is needed."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


def header(job: str, *, synced: int) -> bytes:
    """What a file begins with.

    Args:
        job: the job's name.
        synced: records of the snapshot, this one included; they were synced to the disk.
    """
    return encode_header(pb.Header(format=_FORMAT, job=job, machine=_machine(), synced=synced))


def _machine() -> str:
    """The machine's boot id; "" where the kernel gives none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def write_all(handle: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def loaded(path: Path) -> tuple[str, list[JournalRecord], JobFile]:
    """A file's job and records, and its `JobFile`; a torn end is cut off.

    Raises:
        StoreError: it is corrupt.
    """
    job, bodies, file = scanned(path)
    return job, decoded(path, bodies), file


def decoded(path: Path, bodies: Iterable[bytes]) -> list[JournalRecord]:
    """The records of a file.

    Raises:
        StoreError: one is corrupt.
    """
    with _naming(path):
        return [_record(body) for body in bodies]


def scanned(path: Path) -> tuple[str, list[bytes], JobFile]:
    """Like `loaded`, with the records still encoded."""
    first: pb.Header | None = None
    bodies: list[bytes] = []
    file = JobFile()
    with _naming(path):
        data = path.read_bytes()
        try:
            for frame in frames(data):
                if isinstance(frame, Torn):
                    _check_torn(path, first, file, frame)
                    break
                end, body = frame
                if first is None:
                    first = _header_of(body)
                else:
                    bodies.append(body)
                file.frames, file.size = file.frames + 1, end
                if file.frames == first.synced:
                    file.snapshot = end
        except FrameError as error:
            # After a power cut the unsynced end of a journal may hold anything; what was synced must be sound.
            if first is None or file.frames < first.synced or first.machine == _machine():
                raise
            _log.warning("%s ends at byte %d: the machine was down meanwhile, and %s.", path, file.size, error)
        if first is None:
            raise RecordError("it is empty")
        if file.frames < first.synced:
            raise RecordError(f"it has {file.frames} of the {first.synced} records of its snapshot")
        file.records = file.frames - max(first.synced, 1)
        if file.size < len(data):
            os.truncate(path, file.size)
    return first.job, bodies, file


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add to an error which file is corrupt, and what to do."""
    try:
        yield
    except (FrameError, RecordError, OSError) as error:
        raise StoreError(
            f"The snapshot {path} is corrupt: {error}. Put a good copy in its place; or move it away, and its job "
            "begins anew, without its moving statistics."
        ) from error


def _header_of(body: bytes) -> pb.Header:
    header = decode(body)
    if not isinstance(header, pb.Header):
        raise RecordError("it does not begin with a header")
    if header.format != _FORMAT:
        raise RecordError(f"expected the format {_FORMAT}, found {header.format}")
    return header


def _record(body: bytes) -> JournalRecord:
    record = decode(body)
    if isinstance(record, pb.Header):
        raise RecordError("a second header stands in its middle")
    return record


def _check_torn(path: Path, header: pb.Header | None, file: JobFile, torn: Torn) -> None:
    if header is None or file.frames < header.synced:
        raise FrameError(f"its record {file.frames}, at byte {torn.start}, lacks its end")
    _log.warning(
        "%s ends in %d bytes of an entry that was being written when the service was killed: cut off, nobody was told.",
        path,
        torn.length,
    )
