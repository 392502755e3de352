"""How a rank says to its launcher: if I fail now, it is because I was told of another rank's failure.

Every rank of a job with a lost rank raises a `CollectiveError`, and may be gone before the one it tells of. The
launcher must not take its exit code for the cause. So a rank that gets one leaves an empty file in the
launcher's folder; without a launcher nothing happens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

FOLDER = "BNLAYER_LAUNCH_DIR"  # set by the launcher, for everything it starts


def mark(environ: Mapping[str, str] = os.environ) -> None:
    """Say that this rank was told of another's failure."""
    folder, rank = environ.get(FOLDER), environ.get("BNLAYER_RANK")
    if folder and rank:
        with suppress(OSError):  # the launcher is on another host, or gone: nobody listens
            Path(folder, f"{rank}.peer-failure").touch()


def is_marked(folder: Path, rank: int) -> bool:
    """Whether a rank said so."""
    return (folder / f"{rank}.peer-failure").exists()
