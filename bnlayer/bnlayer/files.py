"""Files that are there whole or not at all.

A file is written under another name in its folder, synced, and renamed. What a path points to counts, not the path: the
target of a link is replaced, and the link stays; permissions stay those that the file had; a device or a pipe, which
nothing can take the place of, is written to.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from bnlayer.fingerprint import digest

_SUFFIX = ".draft"
# A name has at most 255 bytes (143 in an encrypted home folder), and a draft's is longer than its file's.
_LONGEST = 100
_PRIVATE, _OPEN = 0o600, 0o666  # the umask is taken off by the system


def target(path: Path) -> Path:
    """The file that a path stands for: the end of a chain of links, there or not.

    Raises:
        OSError: the links lead in a circle.
    """
    end = Path(os.path.realpath(path))
    if end.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return end


def drafts(path: Path) -> list[Path]:
    """The drafts of a file that killed processes left beside it.

    Raises:
        OSError: its folder can't be read.
    """
    end = target(path)
    ours = re.compile(re.escape(f".{_stem(end.name)}.") + "[^.]+" + re.escape(_SUFFIX))
    return [entry for entry in end.parent.iterdir() if ours.fullmatch(entry.name)]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file; readers, and a crash at any moment, see the old one or the new one.

    When this returns, the new one outlives a loss of power too. It has the old one's mode and, where the system lets
    this process give it, its owner and group; where there was none, the mode of any new file.

    Raises:
        OSError: it cannot be written, and the old one is as it was. Or the folder could not be synchronized: then
            either may be found after a loss of power.
    """
    end = target(path)
    try:
        old = end.stat()
    except FileNotFoundError:
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        end.write_bytes(content)
        return
    draft = end.with_name(f".{_stem(end.name)}.{secrets.token_hex(8)}{_SUFFIX}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _OPEN if old is None else _PRIVATE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if old is not None:
                _permit(file.fileno(), old)
            os.fsync(file.fileno())
        draft.replace(end)
    finally:
        draft.unlink(missing_ok=True)
    # The new name is on disk only when the folder is.
    folder = os.open(end.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _permit(descriptor: int, old: os.stat_result) -> None:
    """Give a draft the owner, group and mode of the file that it replaces."""
    mode = stat.S_IMODE(old.st_mode)
    made = os.fstat(descriptor)
    if made.st_uid != old.st_uid:
        with suppress(PermissionError):  # only root gives files away
            os.fchown(descriptor, old.st_uid, -1)
    if made.st_gid != old.st_gid:
        try:
            os.fchown(descriptor, -1, old.st_gid)
        except PermissionError:
            # The draft's group is another one, which gets no more rights than all users.
            mode = mode & ~stat.S_IRWXG | (mode & stat.S_IRWXO) << 3
    os.fchmod(descriptor, mode)  # last: a new owner takes set-user-ID away


def _stem(name: str) -> str:
    """A file's name, shortened to where a draft's fits; long names that begin alike stay apart."""
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST:
        return name
    suffix = digest(encoded).hex()
    return f"{encoded[: _LONGEST - len(suffix) - 1].decode(errors='ignore')}-{suffix}"
