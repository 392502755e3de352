"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bnworker.train.files import prepare, write_atomically


def test_the_folder_is_made(tmp_path: Path) -> None:
    """A path below folders that are not there yet."""
    path = tmp_path / "a" / "b" / "c.json"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_old_file_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk costs neither the old contents nor leaves a draft."""
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """Found out before the work, not after it."""
    with pytest.raises(IsADirectoryError, match="expected the name of a file"):
        prepare(tmp_path)
