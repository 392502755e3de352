"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

_MODE = 0o644  # as an ordinary new file; `mkstemp` makes private ones
_DRAFT = ".draft"


def prepare(path: Path) -> None:
    """Make the folder of a file that will be written later, so that a wrong path fails before the work.

    Drafts that killed processes left there are removed.

    Raises:
        OSError: the folder cannot be made or written to, or the path is a folder itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected the name of a file.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: no permission to write in its folder.")
    for entry in path.parent.iterdir():
        if entry.name.startswith(f".{path.name}.") and entry.name.endswith(_DRAFT):
            entry.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file; readers, and a crash at any moment, see the old one or the new one.

    When this returns, the new one outlives a loss of power too.

    Raises:
        OSError: it cannot be written, and the old one is as it was. Or the folder could not be synchronized: then
            either may be found after a loss of power.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_DRAFT)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), _MODE)
            os.fsync(file.fileno())
        Path(draft).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(draft).unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
