"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bnlayer.files import _stem
from bnlayer.interchange import save
from bnworker.train.files import prepare, write_atomically
from support.files import trained


def test_the_folder_is_made(tmp_path: Path) -> None:
    """A path below folders that are not there yet."""
    path = tmp_path / "a" / "b" / "c.json"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


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


@pytest.fixture(params=["run", "layers"])
def write(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """What writes files: the training job, and `interchange.save`."""
    if request.param == "run":
        return lambda path, content: write_atomically(path, content.encode())
    return lambda path, content: save(path, trained(content))


def test_the_target_of_a_link_is_replaced(write: Callable[[Path, str], None], tmp_path: Path) -> None:
    """Also over two links and two folders, and where there is no target yet; every link stays."""
    target, link = tmp_path / "disk" / "real.npz", tmp_path / "home" / "layer.npz"
    for folder in (target.parent, link.parent):
        folder.mkdir()
    (target.parent / "current.npz").symlink_to("real.npz")
    link.symlink_to("../disk/current.npz")
    contents = []
    for content in ("first", "second"):
        write(link, content)
        contents.append(target.read_bytes())
    assert contents[0] != contents[1]
    assert link.is_symlink() and (target.parent / "current.npz").is_symlink() and not target.is_symlink()
    names = sorted(str(entry.relative_to(tmp_path)) for entry in tmp_path.glob("*/*"))
    assert names == ["disk/current.npz", "disk/real.npz", "home/layer.npz"]


def test_links_in_a_circle_are_the_systems_error(write: Callable[[Path, str], None], tmp_path: Path) -> None:
    """As for any program; neither link is replaced."""
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    one.symlink_to(two)
    two.symlink_to(one)
    with pytest.raises(OSError, match=r"Too many levels of symbolic links.*one\.npz"):
        write(one, "content")
    assert one.is_symlink() and two.is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444, 0o755])
def test_the_mode_stays(write: Callable[[Path, str], None], mode: int, tmp_path: Path) -> None:
    """A private file stays private, whatever the umask."""
    path = tmp_path / "layer.npz"
    path.touch()
    path.chmod(mode)
    write(path, "new")
    assert path.stat().st_size > 0
    assert path.stat().st_mode & 0o7777 == mode


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_umasks_mode(write: Callable[[Path, str], None], umask: int, tmp_path: Path) -> None:
    """As any other program's."""
    before = os.umask(umask)
    try:
        write(tmp_path / "layer.npz", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "layer.npz").stat().st_mode & 0o7777 == 0o666 & ~umask


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_stays(write: Callable[[Path, str], None], tmp_path: Path) -> None:
    """Where root saves what belongs to somebody else."""
    path = tmp_path / "layer.npz"
    path.touch()
    path.chmod(0o2750)
    os.chown(path, 1234, 2345)
    path.chmod(0o2750)
    write(path, "new")
    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1234, 2345, 0o2750)


def test_a_group_that_cannot_be_kept_gets_no_more_than_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another group would otherwise read what only the old one was let to."""
    path = tmp_path / "layer.npz"
    path.touch()
    path.chmod(0o664)
    real = os.fstat

    def of_another_group(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        return os.stat_result((*status[:5], status.st_gid + 1, *status[6:]))

    def refused(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("bnlayer.files.os.fstat", of_another_group)
    monkeypatch.setattr("bnlayer.files.os.fchown", refused)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o7777 == 0o644


@pytest.mark.parametrize("stem", ["n" * 240, "n" * 251, "名" * 80])
def test_every_legal_name_can_be_written(write: Callable[[Path, str], None], stem: str, tmp_path: Path) -> None:
    """Up to 255 bytes, although a draft's name is longer than its file's; the draft of a killed process is found."""
    path = tmp_path / f"{stem}.npz"
    write(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    other = tmp_path / f"{stem[:-1]}m.npz"
    mine, others = (file.with_name(f".{_stem(file.name)}.0123456789abcdef.draft") for file in (path, other))
    mine.touch()
    others.touch()
    prepare(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([path.name, others.name])


def test_a_device_is_written_to(write: Callable[[Path, str], None], tmp_path: Path) -> None:
    """As `--summary /dev/null`: nothing takes a device's or a pipe's place."""
    pipe = tmp_path / "pipe.npz"
    os.mkfifo(pipe)
    prepare(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write(pipe, "new")
        assert len(os.read(reader, 2**16)) > 0
    finally:
        os.close(reader)
    assert pipe.is_fifo()
