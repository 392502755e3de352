"""What a report needs is looked for before the run starts."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bnworker.cli import main
from bnworker.train.report import MissingExtraError, check, extras

HINTS = {
    "matplotlib": "--report needs matplotlib, which is not installed: pip install 'bnlayer[report]'.",
    "tensorboardX": "--tensorboard needs tensorboardX, which is not installed: pip install 'bnlayer[tensorboard]'.",
}


@pytest.mark.parametrize("package", HINTS)
def test_what_is_missing_is_named(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the extra that brings it; what was not asked for is not missed."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(MissingExtraError) as raised:
        check(tmp_path / "r", tmp_path / "t")
    assert str(raised.value) == HINTS[package]
    check(None, None)


@pytest.mark.parametrize(("option", "package"), [("--report", "matplotlib"), ("--tensorboard", "tensorboardX")])
def test_the_command_reports_it_before_it_starts_anything(
    option: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One line and exit code 2; no rank is launched, no folder made."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == package else find_spec(name))
    monkeypatch.setattr("bnworker.launcher.launch", lambda *_: pytest.fail("it was launched"))
    monkeypatch.setattr(sys, "argv", ["bnlayer", "train", "--workers", "2", option, str(tmp_path / "out")])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert capsys.readouterr().err == f"bnlayer: train: {HINTS[package]}\n"
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made(tmp_path: Path) -> None:
    """With those above them; one that is there is fine."""
    check(tmp_path / "a" / "report", tmp_path / "b")
    check(tmp_path / "a" / "report", tmp_path / "b")
    assert (tmp_path / "a" / "report").is_dir()
    assert (tmp_path / "b").is_dir()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """The option and the path are named."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError) as raised:
        check(None, file)
    assert str(raised.value) == f"--tensorboard: {file} is a file: expected the name of a folder."


def test_a_folder_that_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is said before the run, not after it."""
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError) as raised:
        check(tmp_path, None)
    assert str(raised.value) == f"--report: {tmp_path} cannot be written to."
