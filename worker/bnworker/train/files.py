"""Writing result files: a wrong path is reported before the training, and files are written atomically."""

from __future__ import annotations

import os
from pathlib import Path

from bnlayer import files


def prepare(path: Path) -> None:
    """Make the folder of a file that will be written later, so that a wrong path fails before the training.

    Drafts that killed processes left there are removed. Where the path is a link, the folder is that of its target.

    Raises:
        OSError: the folder cannot be made or written to, or the path is a folder itself.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected the name of a file.")
    if path.exists() and not path.is_file():
        return  # a device or a pipe: it is written to
    folder = files.target(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: no permission to write in its folder.")
    for draft in files.drafts(path):
        draft.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file as `bnlayer.files` does, and make its folder where it is missing.

    Raises:
        OSError: it cannot be written, and the old one is as it was; or see there.
    """
    files.target(path).parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, content)
