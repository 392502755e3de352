"""A state directory: who holds it, which file in it belongs to which job, and who may read them.

There is one file per job, named after it, besides the lock and a name that the directory was given when it was first
used. All of them are their owner's alone, whatever the umask says.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from bnserver.job_file import SUFFIX, Scan, StoreError, file_name, read_regular

_LOCK, _IDENTITY = "lock", "directory-id"
_FILE, _FOLDER = 0o600, 0o700
_LISTED = 5  # files in one error

_log = logging.getLogger("bnserver")


def make(directory: Path) -> None:
    """Make a directory and those above it, as far as they do not exist: their owner's alone.

    Raises:
        OSError: it can't be made.
    """
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=_FOLDER, exist_ok=True)
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is no directory")


def lock(directory: Path) -> IO[str]:
    """Take a directory, until what is returned is closed or the process ends.

    Raises:
        StoreError: another process has it, or it can't be used.
    """
    path = directory / _LOCK
    try:
        make(directory)
        # Without O_NONBLOCK opening a pipe might wait.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.fdopen(os.open(path, flags, _FILE), "a+", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise StoreError(f"The state directory {directory} can't be used: {error}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(file)
        file.close()
        raise StoreError(
            f"The state directory {directory} is in use by {holder}. Stop that daemon, or give this one another "
            "--state-dir: two owners of the same statistics would overwrite each other."
        ) from None
    try:
        file.truncate(0)
        file.write(f"pid {os.getpid()} on host {socket.gethostname()}\n")
        file.flush()
    except OSError as error:  # the disk is full: the lock holds all the same
        _log.warning("The state directory %s can't be written to: %s.", directory, error)
    return file


def holder(directory: Path) -> str | None:
    """Who has taken a directory, as text; None: nobody.

    Raises:
        OSError: its lock can't be read.
    """
    try:
        descriptor = os.open(directory / _LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _holder(file)
    return None


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def identity(directory: Path) -> str:
    """The name that a directory was given when it was first used; "" if it can't be given one.

    Raises:
        StoreError: what holds the name is no regular file.
    """
    path = directory / _IDENTITY
    try:
        return read_regular(path)[0].decode("ascii", "replace").strip()
    except FileNotFoundError:
        pass
    name = secrets.token_hex(8)
    try:
        aside = path.with_suffix(".part")
        with os.fdopen(create(aside), "wb") as file:
            file.write(f"{name}\n".encode())
        aside.replace(path)
    except OSError as error:  # the disk is full: the jobs go on, and only their names distinguish them from others'
        _log.warning("The state directory %s can't be given a name: %s.", directory, error)
        return ""
    return name


def create(path: Path) -> int:
    """A new file for writing, its owner's alone, in place of what has this name; returns its descriptor.

    Raises:
        OSError: it can't be made.
    """
    path.unlink(missing_ok=True)  # what a killed service left; opening a pipe would wait
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE)


def sync(directory: Path) -> None:
    """Have the names in a directory survive a power cut.

    Raises:
        OSError: they can't be written.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def close_to_others(scan: Scan) -> None:
    """Take a file that an earlier version wrote from everybody but its owner, where this process may do so."""
    if scan.mode & 0o077:
        with suppress(OSError):
            scan.path.chmod(scan.mode & 0o700)


def job_files(directory: Path) -> list[Path]:
    """What has the name of a job's file, sorted."""
    with os.scandir(directory) as entries:
        return [directory / name for name in sorted(entry.name for entry in entries) if name.endswith(SUFFIX)]


def refuse_copies(scans: Iterable[Scan]) -> None:
    """Make sure that each job has one file, and that it has the job's name.

    Raises:
        StoreError: there are two files for one job, or one has another name; the text says which.
    """
    by_job: dict[str, list[Scan]] = {}
    for scan in scans:
        by_job.setdefault(scan.job, []).append(scan)
    for job, copies in by_job.items():
        if len(copies) > 1:
            listed = " and ".join(f"{scan.path} ({describe(scan)})" for scan in copies[:_LISTED])
            more = f" and {len(copies) - _LISTED} more" if len(copies) > _LISTED else ""
            raise StoreError(
                f"The state directory holds job {job!r} more than once: {listed}{more}. The service can't know which "
                f"one counts: keep that one, as {file_name(job)}, and move the others away."
            )
        scan = copies[0]
        if scan.path.name != file_name(job):
            raise StoreError(
                f"{scan.path} holds job {job!r} ({describe(scan)}), whose file is named otherwise. If it is the right "
                f"one, rename it to {file_name(job)}; if not, move it away."
            )


def describe(scan: Scan) -> str:
    """Which one a file is, for errors."""
    number = (
        f"snapshot {scan.header.number}" if scan.header.number else "a snapshot" if scan.snapshot else "no snapshot"
    )
    return f"{number}, {scan.journal} records after it"
