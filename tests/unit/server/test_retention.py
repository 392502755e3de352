"""Jobs that are over are kept for as long as the operator says, and no job that is not over is ever forgotten."""

import asyncio
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from bnlayer.agreement import Peer
from bnserver.core.effects import Persist
from bnserver.core.events import Join, Leave
from bnserver.core.journal_records import Ended, JournalRecord
from bnserver.core.service import Service
from bnserver.job_file import file_name
from bnserver.retention import Keep, MemoryRetention
from bnserver.saving import Saving
from bnserver.store import Store
from support.journals import SNAPSHOT, written

_DAY_S = 86400.0
_ENDED = {"a": 0.0, "b": 10 * _DAY_S, "c": 10 * _DAY_S, "d": 11 * _DAY_S}


@pytest.mark.parametrize(
    ("keep", "expired"),
    [
        (Keep(), []),
        (Keep(days=1.0), ["a", "b", "c"]),
        (Keep(days=2.0), ["a"]),
        (Keep(days=0.0), ["a", "b", "c", "d"]),
        (Keep(jobs=4), []),
        (Keep(jobs=2), ["a", "b"]),
        (Keep(jobs=0), ["a", "b", "c", "d"]),
        (Keep(days=1.0, jobs=3), ["a", "b", "c"]),
        (Keep(days=100.0, jobs=3), ["a"]),
    ],
)
def test_what_is_kept(keep: Keep, expired: list[str]) -> None:
    """By age and by number, whichever is less; the oldest goes first, and of equals always the same one."""
    assert keep.expired(dict(reversed(_ENDED.items())), 12 * _DAY_S) == expired


def _left_behind(directory: Path, ages: dict[str, int]) -> None:
    """Jobs that ended so many days ago; "running" did not end."""
    for job, days in ages.items():
        path = written(directory, job, SNAPSHOT if job == "running" else [Ended(1)])
        ended = time.time() - days * _DAY_S
        os.utime(path, times=(ended, ended))


def _saving(store: Store, keep: Keep) -> tuple[Saving, Service]:
    service = Service(store.load(finished=False))
    return Saving(store, service, lambda saving: None, keep), service


def test_files_of_jobs_that_are_over_are_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that are not kept, and no others; a rank that comes back finds a new job."""
    _left_behind(tmp_path, {"running": 90, "old": 40, "older": 50, "young": 1})
    (tmp_path / "notes.txt").write_text("somebody else's")
    store = Store(tmp_path)
    saving, service = _saving(store, Keep(days=30.0))
    with caplog.at_level(logging.INFO, "bnserver"):
        asyncio.run(saving.expire())
        asyncio.run(saving.expire())
    assert sorted(store.last_written()) == sorted(map(file_name, ("running", "young")))
    assert (tmp_path / "notes.txt").exists()
    assert caplog.messages == [
        f"forgot 2 jobs that are over (--keep-jobs, --keep-jobs-days): {file_name('older')!r}, {file_name('old')!r}"
    ]
    assert not store.holds("old")
    assert service.jobs == ("running",)
    store.close()


def test_nothing_is_deleted_unless_somebody_says_so(tmp_path: Path) -> None:
    """The default."""
    _left_behind(tmp_path, {"old": 4000})
    store = Store(tmp_path)
    saving, _ = _saving(store, Keep())
    asyncio.run(saving.expire())
    assert store.holds("old")
    store.close()


class _SlowRead(Store):
    """Reads a file back when it is told to."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def read(self, job: str) -> list[JournalRecord]:
        self.begun.set()
        assert self.go_on.wait(60)
        return super().read(job)


def test_a_job_that_is_being_read_back_is_not_deleted(tmp_path: Path) -> None:
    """A rank joins it at this moment: it is in memory afterwards, and its file stays."""
    _left_behind(tmp_path, {"old": 40, "older": 50})

    async def scene() -> None:
        store = _SlowRead(tmp_path)
        saving, service = _saving(store, Keep(jobs=0))
        recall = asyncio.create_task(saving.recall("old", lambda: 0.0))
        await asyncio.to_thread(store.begun.wait, 60)
        expire = asyncio.create_task(saving.expire())
        while not (expire.done() or saving._recalling._waiters):  # noqa: ASYNC110 - a lock says no more
            await asyncio.sleep(0.001)
        assert not expire.done()
        store.go_on.set()
        await asyncio.gather(recall, expire)
        assert service.jobs == ("old",)
        assert list(store.last_written()) == [file_name("old")]
        store.close()

    asyncio.run(scene())


def test_a_service_without_a_state_directory_forgets_too() -> None:
    """Otherwise its memory grows with every job that there ever was."""
    service = Service()
    retention = MemoryRetention(Keep(jobs=1), service)
    for connection, job in enumerate(("first", "second", "running"), 1):
        service.handle(Join(connection, job, Peer(0), 1, 9.0, 9.0), 0.0)
        if job != "running":
            (persist,) = [each for each in service.handle(Leave(connection, ""), 0.0) if isinstance(each, Persist)]
            retention.persist(persist)
            asyncio.run(retention.expire())
    retention.persist(Persist("running"))
    asyncio.run(retention.expire())
    assert service.jobs == ("second", "running")


@pytest.mark.parametrize("days", [400, -400])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_clock_that_is_set_deletes_nothing(
    days: int, in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong time, for a minute, deleted every job that was over; what it says is believed at the next start."""
    _left_behind(tmp_path, {"young": 1, "old": 40})
    store, keep = Store(tmp_path), Keep(days=30.0)
    real = time.time
    if in_memory:
        service = Service()
        retention = MemoryRetention(keep, service)
        service.handle(Join(1, "j", Peer(0), 1, 9.0, 9.0), 0.0)
        service.handle(Leave(1, ""), 0.0)
        retention.persist(Persist("j"))
        monkeypatch.setattr(time, "time", lambda: real() + days * _DAY_S)
        asyncio.run(retention.expire())
        assert service.knows("j")
    else:
        saving, _ = _saving(store, keep)
        monkeypatch.setattr(time, "time", lambda: real() + days * _DAY_S)
        asyncio.run(saving.expire())
        assert store.holds("young")
        assert store.holds("old") is (days < 0)
    store.close()
