"""One job's file in the state directory: what is in it, and how it is read back.

A file is a snapshot, followed by the journal of what came after it: both are journal records, in the same frames. It
begins with a header that says whose it is (the job, the state directory) and which (the number of the snapshot).

What is loaded is what was written: checksums cover every byte. A torn last record is cut off, because no answer that
depends on it was sent. Anything else that is wrong is reported, never skipped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from urllib.parse import quote

from bnproto.v1 import journal_pb2 as pb
from bnserver.core.journal_records import JournalRecord
from bnserver.journal_encoding import FrameError, RecordError, Torn, decode, encode_header, frames

SUFFIX = ".job"

_FORMAT = 1
_HEADER_BYTES = 2**12  # a header has less: names of up to 200 characters
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_log = logging.getLogger("bnserver")


class StoreError(RuntimeError):
    """The state directory can't be used; the text gives the reason, and what to do."""


@dataclass(slots=True)
class JobFile:
    """A job's file, as the service that writes it knows it.

    Attributes:
        handle: its descriptor, open for appending; None: nothing was appended lately.
        frames: in it so far.
        size: its bytes so far.
        records: appended since the snapshot.
        snapshot: bytes of it.
        number: which of the job's snapshots it is.
        broken: whether it lacks a record, so that it must be replaced.
        meanwhile: what was appended while a snapshot is being written; None while none is.
        lost: why a record that came meanwhile could not be encoded; None: all could.
        writing: held while a snapshot is written.
    """

    handle: int | None = None
    frames: int = 0
    size: int = 0
    records: int = 0
    snapshot: int = 0
    number: int = 0
    broken: bool = False
    meanwhile: list[bytes] | None = None
    lost: StoreError | None = None
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_snapshot(self) -> bool:
        """Whether it holds a snapshot and nothing else."""
        return self.snapshot > 0 and not self.records

    def close(self) -> None:
        """Close the descriptor; it is opened again when it is needed."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


@dataclass(frozen=True, slots=True)
class Scan:
    """A file as it was found; its checksums hold.

    Attributes:
        path: where.
        header: whose it is, and which.
        bodies: its records, encoded.
        frames, size: of it that are sound.
        snapshot: bytes of the snapshot; 0: it has none.
        torn: why what comes after `size` does not count; "" if nothing does.
        mode: who may read it.
    """

    path: Path
    header: pb.Header
    bodies: list[bytes]
    frames: int
    size: int
    snapshot: int
    torn: str
    mode: int

    @property
    def job(self) -> str:
        """The job's name."""
        return self.header.job

    @property
    def journal(self) -> int:
        """Records after the snapshot."""
        return self.frames - max(self.header.synced, 1)

    def records(self) -> list[JournalRecord]:
        """The records.

        Raises:
            StoreError: one is corrupt.
        """
        with _naming(self.path):
            return [_record(body) for body in self.bodies]

    def mend(self) -> JobFile:
        """Cut off a torn end, which is logged; returns what a service that goes on writing must know.

        Raises:
            StoreError: it can't be cut off.
        """
        if self.torn:
            _log.warning("%s %s", self.path, self.torn)
            with _naming(self.path):
                os.truncate(self.path, self.size)
        return JobFile(None, self.frames, self.size, self.journal, self.snapshot, self.header.number)


def file_name(job: str) -> str:
    """The name of a job's file: readable, valid, and unique to the job."""
    digest = blake2b(job.encode(), digest_size=8).hexdigest()
    return f"{quote(job[:80], safe='')[:80]}.{digest}{SUFFIX}"


def header(
    job: str, *, synced: int, directory: str = "", number: int = 0, checkpoint: str = "", step: int = 0
) -> bytes:
    """What a file begins with.

    Args:
        job: the job's name.
        synced: records of the snapshot, this one included; they were synced to the disk.
        directory: the name of the state directory; "" if it has none.
        number: of the snapshot.
        checkpoint, step: of a checkpoint: its name and its training step.
    """
    fields = pb.Header(
        format=_FORMAT,
        job=job,
        machine=_machine(),
        synced=synced,
        directory=directory,
        number=number,
        checkpoint=checkpoint,
        step=step,
    )
    return encode_header(fields)


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


def read_regular(path: Path, most: int = -1) -> tuple[bytes, int]:
    """The content of a regular file, or its first bytes, and its mode.

    What else has its name is refused without being waited for.

    Raises:
        StoreError: it is something else.
        OSError: it can't be read.
    """
    _refuse_others(path, os.stat(path))  # noqa: PTH116 - there may be 20,000; opening a device may do something
    # Without O_NONBLOCK opening a pipe, which may have come meanwhile, would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123
        status = os.fstat(descriptor)
        _refuse_others(path, status)
        return file.read(most), stat.S_IMODE(status.st_mode)


def _refuse_others(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise StoreError(
            f"{path} is {kind}, expected a regular file. The service did not put it there: move it away, then start "
            "the service again."
        )


def loaded(path: Path) -> tuple[str, list[JournalRecord], JobFile]:
    """A file's job and records, and its `JobFile`; a torn end is cut off.

    Raises:
        StoreError: it is corrupt.
    """
    scanned = scan(path)
    return scanned.job, scanned.records(), scanned.mend()


def scan(path: Path) -> Scan:
    """Read a file and verify its checksums; nothing is changed.

    Raises:
        StoreError: it is corrupt, or no regular file.
    """
    data, mode = _content(path)
    with _naming(path):
        first: pb.Header | None = None
        bodies: list[bytes] = []
        count = size = snapshot = 0
        torn = ""
        try:
            for frame in frames(data):
                if isinstance(frame, Torn):
                    if first is None or count < first.synced:
                        raise FrameError(f"its record {count}, at byte {frame.start}, lacks its end")
                    torn = (
                        f"ends in {frame.length} bytes of an entry that was being written when the service was killed: "
                        "cut off, nobody was told."
                    )
                    break
                end, body = frame
                if first is None:
                    first = _header_of(body, path)
                else:
                    bodies.append(body)
                count, size = count + 1, end
                if count == first.synced:
                    snapshot = end
        except FrameError as error:
            # After a power cut the unsynced end of a journal may hold anything; what was synced must be sound.
            if first is None or count < first.synced or first.machine == _machine():
                raise
            torn = f"ends at byte {size}: the machine was down meanwhile, and {error}."
        if first is None:
            raise RecordError("it is empty")
        if count < first.synced:
            raise RecordError(f"it has {count} of the {first.synced} records of its snapshot")
    return Scan(path, first, bodies, count, size, snapshot, torn, mode)


def first_header(path: Path) -> pb.Header:
    """A file's header; what follows it is not looked at.

    Raises:
        StoreError: it is corrupt, or no regular file.
    """
    data, _ = _content(path, _HEADER_BYTES)
    with _naming(path):
        frame = next(frames(data), None)
        if frame is None or isinstance(frame, Torn):
            raise RecordError("it lacks its header")
        return _header_of(frame[1], path)


def _content(path: Path, most: int = -1) -> tuple[bytes, int]:
    try:
        return read_regular(path, most)
    except OSError as error:
        raise StoreError(
            f"{path} can't be read: {error.strerror}. Give it to the user that runs the service (chown, chmod 600); or "
            "move it away, and its job begins anew, without its moving statistics."
        ) from error


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


def _header_of(body: bytes, path: Path) -> pb.Header:
    header = decode(body)
    if not isinstance(header, pb.Header):
        raise RecordError("it does not begin with a header")
    if header.format != _FORMAT:
        raise RecordError(f"expected the format {_FORMAT}, found {header.format}")
    if header.checkpoint and path.suffix == SUFFIX:
        raise RecordError(f"it is the checkpoint {header.checkpoint!r}, of which bnlayer state restore makes a job")
    return header


def _record(body: bytes) -> JournalRecord:
    record = decode(body)
    if isinstance(record, pb.Header):
        raise RecordError("a second header stands in its middle")
    return record
