"""Whose a file in a state directory is, which one it is, and who may read it."""

import asyncio
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from bnserver.job_file import StoreError, scan
from bnserver.store import Store
from support.journals import JOURNAL, SNAPSHOT, SUMS, all_loaded, same, written

# ---- whose, and which ----


def test_two_files_of_one_job_are_both_named(tmp_path: Path) -> None:
    """A copy beside the file, made by hand, was taken for the job: it went back in time, in silence."""
    path = written(tmp_path, "j", SNAPSHOT)
    copy = tmp_path / "zz.job"
    shutil.copy(path, copy)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.suffix == ".job"}
    with pytest.raises(StoreError) as caught:
        all_loaded(tmp_path)
    assert str(caught.value) == (
        f"The state directory holds job 'j' more than once: {path} (snapshot 1, 0 records after it) and {copy} "
        "(snapshot 1, 0 records after it). The service can't know which one counts: keep that one, as "
        f"{path.name}, and move the others away."
    )
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.suffix == ".job"} == before


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    """It would be read as the job, and never written: the next start had two."""
    path = written(tmp_path, "j", SNAPSHOT, JOURNAL[:2])
    other = path.rename(tmp_path / "a copy.job")
    with pytest.raises(StoreError) as caught:
        all_loaded(tmp_path)
    assert str(caught.value) == (
        f"{other} holds job 'j' (snapshot 1, 2 records after it), whose file is named otherwise. If it is the right "
        f"one, rename it to {path.name}; if not, move it away."
    )


def test_a_file_that_became_another_jobs_is_not_read_back(tmp_path: Path) -> None:
    """A copy over it, while the service runs."""
    path, other = written(tmp_path, "j", SNAPSHOT), written(tmp_path, "k", SNAPSHOT)
    store = Store(tmp_path)
    shutil.copy(other, path)
    with pytest.raises(StoreError, match=f"{path} holds job 'k', expected job 'j': put the right file in its place"):
        store.read("j")
    store.close()


def test_a_file_says_where_it_was_written_and_which_snapshot_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts through restarts; a file that was brought from another directory is taken over, and that is told."""
    here, there = tmp_path / "here", tmp_path / "there"
    written(here, "j", SNAPSHOT)
    path = written(here, "j", SNAPSHOT, [SUMS])
    scanned = scan(path)
    assert (scanned.header.number, scanned.journal) == (2, 1)
    assert scanned.header.directory == (here / "directory-id").read_text().strip()
    written(there, "k", SNAPSHOT)
    assert not caplog.messages
    shutil.copy(path, there / path.name)
    assert same(all_loaded(there)["j"], [*SNAPSHOT, SUMS])
    assert caplog.messages == [
        f"1 files in {there} were written in another state directory, e.g. {path.name} of job 'j': they are taken over"
    ]
    written(there, "j", SNAPSHOT)
    scanned = scan(there / path.name)
    assert (scanned.header.number, scanned.header.directory) == (3, (there / "directory-id").read_text().strip())


# ---- what is no file ----


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


_OTHERS: dict[str, Callable[[Path], object]] = {
    "is a pipe, expected a regular file": os.mkfifo,
    "is a socket, expected a regular file": _socket,
    "is a directory, expected a regular file": Path.mkdir,
    "is a device, expected a regular file": lambda path: path.symlink_to("/dev/zero"),
    "can't be read: No such file or directory": lambda path: path.symlink_to("nowhere"),
    "can't be read: Too many levels of symbolic links": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("text", _OTHERS)
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path, text: str) -> None:
    """At the start, and where a job is read back; a pipe waited for its writer, for ever."""
    path = written(tmp_path, "j", SNAPSHOT)
    path.unlink()
    _OTHERS[text](path)
    store = Store(tmp_path)
    for reads in (store.load, lambda: store.read("j")):
        with pytest.raises(StoreError, match=f"^{path} {text}"):
            reads()
    store.close()


def test_a_pipe_in_the_way_of_a_write_is_replaced(tmp_path: Path) -> None:
    """Of a snapshot, and of a journal's first record: the event loop waited for a reader."""
    store = Store(tmp_path)
    aside = store.path("j").with_suffix(".part")
    os.mkfifo(aside)
    store.append("j", SUMS)
    os.mkfifo(aside)
    asyncio.run(store.save("j", lambda: SNAPSHOT))
    store.close()
    assert same(all_loaded(tmp_path)["j"], SNAPSHOT)


@pytest.mark.parametrize("name", ["lock", "directory-id"])
def test_a_pipe_in_place_of_the_directorys_own_files_is_an_error(tmp_path: Path, name: str) -> None:
    """It names the directory, and does not wait."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(StoreError, match=f"^The state directory {tmp_path} can't be used: "):
        Store(tmp_path)


# ---- who may read it ----


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    """Whatever the umask; those of an earlier version are closed to others at the start."""
    directory = tmp_path / "above" / "state"
    before = os.umask(0)
    try:
        path = written(directory, "j", SNAPSHOT, JOURNAL[:1])
        written(directory, "k", (), JOURNAL[:1])
    finally:
        os.umask(before)
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (directory, directory.parent)} == {0o700}
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o600}
    assert len(list(directory.iterdir())) == 4
    path.chmod(0o644)
    all_loaded(directory)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
