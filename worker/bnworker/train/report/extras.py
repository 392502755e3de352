"""Checks, before the run starts, of what a report needs."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path


class MissingExtraError(ImportError):
    """An option needs a package that is not installed."""


def check(report: Path | None, tensorboard: Path | None) -> None:
    """Check that the requested report can be written; makes the folders.

    Args:
        report: the folder of the page and its pictures; None: not asked for.
        tensorboard: the folder of the event files; None: not asked for.

    Raises:
        MissingExtraError: matplotlib or tensorboardX is not installed.
        OSError: a folder can't be created or written to.
    """
    if report is not None:
        _need("--report", "matplotlib", "report")
        _prepare("--report", report)
    if tensorboard is not None:
        _need("--tensorboard", "tensorboardX", "tensorboard")
        _prepare("--tensorboard", tensorboard)


def _need(option: str, package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise MissingExtraError(f"{option} needs {package}, which is not installed: pip install 'bnlayer[{extra}]'.")


def _prepare(option: str, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{option}: {folder} is a file: expected the name of a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{option}: {folder} cannot be written to.")
