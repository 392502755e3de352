"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

_MODE = 0o644  # as an ordinary new file; `mkstemp` makes private ones


def prepare(path: Path) -> None:
    """Make the folder of a file that will be written later, so that a wrong path fails before the work.

    Raises:
        OSError: the folder cannot be made, or the path is a folder itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected the name of a file.")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file; readers, and a crash at any moment, see the old one or the new one.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    prepare(path)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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
