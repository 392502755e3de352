"""Files that hold a secret: they are read only if no stranger on this machine can read or change them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# Readable by the group is allowed: Kubernetes and systemd hand secrets to a service that way.
_STRANGERS = stat.S_IRWXO | stat.S_IWGRP
LARGEST_BYTES = 2**20  # of a file with keys, certificates or tokens


class PrivateFileError(ValueError):
    """A file with a secret can't be read, or is open to others; the text says what to do."""


def read_private(path: Path) -> bytes:
    """The content of a file with a secret.

    Raises:
        PrivateFileError: it can't be read, is no regular file, or is open to others.
    """
    return _read(path, private=True)


def read_public(path: Path) -> bytes:
    """The content of a file whose content everybody may know, such as a certificate.

    Raises:
        PrivateFileError: it can't be read, or is no regular file.
    """
    return _read(path, private=False)


def _read(path: Path, *, private: bool) -> bytes:
    try:
        # Without O_NONBLOCK opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PrivateFileError(f"Can't read {path}: {error.strerror}.") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PrivateFileError(f"Can't read {path}: expected a regular file.")
        if private and status.st_mode & _STRANGERS:
            raise PrivateFileError(
                f"{path} holds a secret, and others on this machine may read or change it (mode "
                f"{stat.S_IMODE(status.st_mode):04o}). Make it yours alone: chmod 600 {path}"
            )
        content = file.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise PrivateFileError(f"Can't read {path}: expected at most {LARGEST_BYTES} bytes.")
    return content
