"""Checkpoints: named, of one training step, whole or not there, and no more of them than permitted."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from bnlayer.agreement import Peer
from bnlayer.collective import CHECKPOINT, Call, ExchangeKey, Operation, PlainSignature
from bnserver import checkpoints, state_directory
from bnserver.checkpoints import Checkpoints, NotKeptError
from bnserver.core.effects import Checkpoint, Effect, Failed, Released
from bnserver.core.events import Contribute, Join, Malformed, Push
from bnserver.core.service import Service
from bnserver.core.validation import validated
from bnserver.job_file import StoreError, file_name
from bnserver.state_editing import forget_job
from bnserver.store import Store
from support.journals import SNAPSHOT, state_of, written

_STATES = {"a": state_of("float32", 2), "ü": state_of("float64", 3)}


def _call(*fields: str) -> Call:
    return Call(Operation.BARRIER, ExchangeKey(None, None, 0), PlainSignature(CHECKPOINT, fields))


def _asked(name: str, step: int = 7, job: str = "j") -> Checkpoint:
    return Checkpoint((), 1, job, name, step, _STATES)


def _write(to: Checkpoints, *asked: Checkpoint) -> None:
    async def each() -> None:
        for one in asked:
            await to.write(one)

    asyncio.run(each())


def _names(directory: Path, job: str = "j") -> list[str]:
    return [stored.name for stored in checkpoints.look(directory, job) if not stored.fault]


# ---- in the core ----


def _of_two_ranks(*fields: Sequence[str]) -> tuple[Service, list[Effect]]:
    service = Service()
    for rank in range(2):
        service.handle(Join(rank, "j", Peer(rank), 2, 9.0, 9.0), 0.0)
    service.handle(Push(0, "a", _STATES["a"]), 0.0)
    effects = []
    for rank, each in enumerate(fields):
        effects = service.handle(Contribute(rank, 1, 1, _call(*each), None), 0.0)
    return service, effects


def test_all_ranks_ask_and_are_answered_once_it_is_kept() -> None:
    """The core says what is to be kept: the states of that moment. The rim answers when they are on disk."""
    _, effects = _of_two_ranks(("best", "7"), ("best", "7"))
    (kept,) = effects
    assert isinstance(kept, Checkpoint)
    assert (kept.connections, kept.job, kept.name, kept.step, list(kept.layers)) == ((0, 1), "j", "best", 7, ["a"])


def test_a_rank_that_asks_again_has_the_same_state_kept() -> None:
    """Not the one that another rank pushed meanwhile."""
    service, (kept,) = _of_two_ranks(("best", "7"), ("best", "7"))
    assert isinstance(kept, Checkpoint)
    service.handle(Push(0, "a", state_of("float32", 2), 1), 0.0)
    (repeated,) = service.handle(Contribute(1, 1, 1, _call("best", "7"), None), 0.0)
    assert isinstance(repeated, Checkpoint)
    assert repeated.layers["a"] is kept.layers["a"]
    assert repeated.connections == (1,)


@pytest.mark.parametrize("other", [("best", "8"), ("worst", "7")])
def test_ranks_must_agree(other: tuple[str, str]) -> None:
    """On the name and on the step."""
    _, effects = _of_two_ranks(("best", "7"), other)
    assert {type(effect) for effect in effects[:2]} == {Failed}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ((), "expected the name and the step of a checkpoint, received 0 terms"),
        (("a", "1", "2"), "expected the name and the step of a checkpoint, received 3 terms"),
        (("", "1"), "as the name of a checkpoint, received ''"),
        ((".hidden", "1"), "received '.hidden'"),
        (("../../etc/passwd", "1"), "received '../../etc/passwd'"),
        (("a\n", "1"), "received 'a\\n'"),
        (("ü", "1"), "received 'ü'"),
        (("a" * 101, "1"), "of 101 characters"),
        (("a", ""), "expected a checkpoint's step from 0 to 2^62, received ''"),
        (("a", "-1"), "received '-1'"),
        (("a", "01"), "received '01'"),
        (("a", "1_000"), "received '1_000'"),
        (("a", str(2**62 + 1)), "received '4611686018427387905'"),
        (("a", "9" * 900), "of 900 characters"),
    ],
)
def test_what_can_not_be_a_file_is_refused(fields: tuple[str, ...], text: str) -> None:
    """Before the core sees it: the name becomes part of a path."""
    refused = validated(Contribute(0, 1, 1, _call(*fields), None))
    assert isinstance(refused, Malformed)
    assert text in refused.text
    for name, step in (("a", "0"), ("Epoch-3_b.2", str(2**62)), ("a" * 100, "10")):
        assert isinstance(validated(Contribute(0, 1, 1, _call(name, step), None)), Contribute)


def test_a_barrier_without_such_terms_is_a_barrier() -> None:
    """As ranks of earlier versions send it."""
    service = Service()
    service.handle(Join(0, "j", Peer(0), 1, 9.0, 9.0), 0.0)
    call = Call(Operation.BARRIER, ExchangeKey(None, None, 0), PlainSignature())
    assert service.handle(Contribute(0, 1, 1, call, None), 0.0) == [Released((0,), 1)]


# ---- on disk ----


def test_what_is_read_back_is_what_was_kept(tmp_path: Path) -> None:
    """To the bit, with its step; the file is its owner's alone, whatever the umask says."""
    before = os.umask(0)
    try:
        _write(Checkpoints(tmp_path, 9, None), _asked("best", 2**62))
    finally:
        os.umask(before)
    (stored,) = checkpoints.look(tmp_path, "j")
    assert (stored.name, stored.step, stored.number, stored.fault) == ("best", 2**62, 1, "")
    assert {name: state.fingerprint for name, state in stored.layers.items()} == {
        name: state.fingerprint for name, state in _STATES.items()
    }
    assert stat.S_IMODE(stored.path.stat().st_mode) == 0o600
    assert not list(tmp_path.glob("*.part"))


def test_each_is_of_its_job(tmp_path: Path) -> None:
    """Jobs whose names begin alike, and names with dots."""
    _write(Checkpoints(tmp_path, 9, None), _asked("a"), _asked("a.b"), _asked("b", job="j2"), _asked("c", job="j/../j"))
    assert [_names(tmp_path, job) for job in ("j", "j2", "j/../j")] == [["a", "a.b"], ["b"], ["c"]]


def test_one_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    """It is the latest then."""
    _write(Checkpoints(tmp_path, 2, None), _asked("best", 1), _asked("b", 2), _asked("best", 3))
    assert [(stored.name, stored.step) for stored in checkpoints.look(tmp_path, "j")] == [("b", 2), ("best", 3)]


def test_the_latest_are_kept(tmp_path: Path) -> None:
    """Counted in the order in which they were made: no clock, and no step, which may go back, decides."""
    kept = Checkpoints(tmp_path, 9, 2)
    _write(kept, _asked("a", 300), _asked("b", 200), _asked("c", 100), _asked("x", job="other"))
    assert (_names(tmp_path), _names(tmp_path, "other")) == (["b", "c"], ["x"])
    for path in tmp_path.glob("*.b.checkpoint"):
        os.utime(path, (2**31, 2**31))
    _write(kept, _asked("d"))
    assert _names(tmp_path) == ["c", "d"]
    _write(kept, _asked("c"))
    assert _names(tmp_path) == ["d", "c"]


def test_one_too_many_is_refused(tmp_path: Path) -> None:
    """At the quota it is written, above it nothing is; one that replaces another is none more."""
    kept = Checkpoints(tmp_path, 2, None)
    _write(kept, _asked("a"), _asked("b"))
    with pytest.raises(NotKeptError) as raised:
        _write(kept, _asked("c"))
    assert str(raised.value) == (
        "The service refused checkpoint 'c' of job 'j': expected at most 2 checkpoints of a job, received a request "
        "for 3; the service's --max-checkpoints raises the quota. With --keep-checkpoints it deletes the oldest ones "
        "by itself."
    )
    _write(kept, _asked("b", 9))
    _write(Checkpoints(tmp_path, 2, 2), _asked("c"))
    assert _names(tmp_path) == ["b", "c"]


def test_a_damaged_one_is_named_and_never_deleted_by_itself(tmp_path: Path) -> None:
    """It counts for the quota: it takes its place on the disk."""
    kept = Checkpoints(tmp_path, 3, 1)
    _write(kept, _asked("a"))
    (path,) = tmp_path.glob("*.checkpoint")
    content = path.read_bytes()
    path.write_bytes(content[:40])
    _write(kept, _asked("b"), _asked("c"))
    assert _names(tmp_path) == ["c"]
    assert [stored.name for stored in checkpoints.look(tmp_path, "j") if "is corrupt" in stored.fault] == ["a"]
    for offset in range(0, len(content), 97):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        assert [stored.name for stored in checkpoints.look(tmp_path, "j") if stored.fault] == ["a"], offset


def test_another_name_than_the_files_is_a_fault(tmp_path: Path) -> None:
    """A copy takes nobody to a step that its name does not say; nor is it a job's file."""
    _write(Checkpoints(tmp_path, 9, None), _asked("a"))
    (path,) = tmp_path.glob("*.checkpoint")
    copy = path.with_name(path.name.replace(".a.", ".b."))
    copy.write_bytes(path.read_bytes())
    (fault,) = [stored.fault for stored in checkpoints.look(tmp_path, "j") if stored.name == "b"]
    assert fault == f"{copy} holds checkpoint 'a' of job 'j', expected 'b' of job 'j': move it away."
    (tmp_path / file_name("j")).write_bytes(path.read_bytes())
    store = Store(tmp_path)
    try:
        with pytest.raises(StoreError, match="it is the checkpoint 'a', of which bnlayer state restore makes a job"):
            store.load()
    finally:
        store.close()


def test_a_pipe_in_its_place_holds_up_nobody(tmp_path: Path) -> None:
    """Neither the one who lists them nor the next checkpoint, which takes the place of what has its name."""
    kept = Checkpoints(tmp_path, 9, 5)
    _write(kept, _asked("a"))
    (path,) = tmp_path.glob("*.checkpoint")
    path.unlink()
    os.mkfifo(path)
    assert "is a pipe" in checkpoints.look(tmp_path, "j")[0].fault
    _write(kept, _asked("b"), _asked("a"))
    assert _names(tmp_path) == ["b", "a"]


def test_a_full_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing half."""
    kept = Checkpoints(tmp_path, 9, None)
    _write(kept, _asked("a", 1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotKeptError, match=r"'a' of job 'j' could not be written: .* No space left on device"):
        _write(kept, _asked("a", 2))
    assert [(stored.name, stored.step) for stored in checkpoints.look(tmp_path, "j")] == [("a", 1)]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("directory", "asked", "text"),
    [
        (False, _asked("a"), "The service has no state directory to keep checkpoints in: start it with --state-dir."),
        (True, Checkpoint((), 1, "j", "a", 1, {}), "Job 'j' has no layers yet"),
    ],
)
def test_what_can_not_be_kept_is_said(directory: bool, asked: Checkpoint, text: str, tmp_path: Path) -> None:
    """Never taken for success."""
    with pytest.raises(NotKeptError, match=text):
        _write(Checkpoints(tmp_path if directory else None, 9, None), asked)
    assert not list(tmp_path.iterdir())


def test_a_job_is_forgotten_with_its_checkpoints(tmp_path: Path) -> None:
    """By hand, and where jobs expire; the others' stay."""
    for job in ("j", "gone"):
        written(tmp_path, job, SNAPSHOT)
        _write(Checkpoints(tmp_path, 9, None), _asked("a", job=job), _asked("b", job=job))
    store = Store(tmp_path)
    try:
        store.delete(file_name("gone"))
        assert (_names(tmp_path, "gone"), _names(tmp_path)) == ([], ["a", "b"])
        assert forget_job(store, "j")
        assert not forget_job(store, "j")
    finally:
        store.close()
    assert not list(tmp_path.glob("*.checkpoint"))


def test_the_service_starts_without_reading_them(tmp_path: Path) -> None:
    """However they are."""
    written(tmp_path, "j", SNAPSHOT)
    _write(Checkpoints(tmp_path, 9, None), _asked("a"))
    (path,) = tmp_path.glob("*.checkpoint")
    path.write_bytes(b"damaged")
    store = Store(tmp_path)
    try:
        assert list(store.load()) == ["j"]
    finally:
        store.close()
    assert [stored.name for stored in checkpoints.headers(tmp_path, "j")] == ["a"]
    assert state_directory.job_files(tmp_path) == [tmp_path / file_name("j")]
