"""What is loaded is what was written, or an error that names the file."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer.agreement import Peer
from bnserver import job_file as module
from bnserver.core.events import Elastic, Replacing
from bnserver.core.journal_records import (
    Began,
    Completed,
    Ended,
    JournalRecord,
    LayerSnapshot,
    Left,
    MemberRecord,
    Pushed,
)
from bnserver.core.reasons import Reason
from bnserver.failpoints import VARIABLE, Failpoints
from bnserver.job_file import StoreError
from bnserver.journal_encoding import decode, encode
from bnserver.store import Store
from support.journals import JOURNAL, SNAPSHOT, SUMS, all_loaded, same, state_of, written

# ---- what is written ----


_ELASTIC = Began(4, 1, (MemberRecord(Peer(0, "h", 7), 6, 1.0),), Elastic(1, 5)), Ended(4, Reason.FINISHED, "text")


@pytest.mark.parametrize("record", [*SNAPSHOT, *JOURNAL, *_ELASTIC], ids=lambda record: type(record).__name__)
def test_an_entry_comes_back_as_it_was(record: JournalRecord) -> None:
    """Every field, and every bit of an array."""
    got = decode(encode(record))
    assert type(got) is type(record)
    assert encode(got) == encode(record)
    if isinstance(record, Completed) and isinstance(got, Completed):
        assert (got.sequence, got.call, got.known) == (record.sequence, record.call, record.known)
        assert type(got.body) is type(record.body)
        if isinstance(record.body, Replacing) and isinstance(got.body, Replacing):
            assert got.body.limbs.tolist() == record.body.limbs.tolist()
            assert got.body.state.fingerprint == record.body.state.fingerprint
            assert got.body.state.version == record.body.state.version
        if isinstance(record.body, np.ndarray) and isinstance(got.body, np.ndarray):
            assert (got.body.dtype, got.body.tolist()) == (record.body.dtype, record.body.tolist())
    if isinstance(record, Began | Left | Ended):
        assert got == record


def test_what_is_loaded_is_what_was_written(tmp_path: Path) -> None:
    """A snapshot and what came after it, of every job, whatever their names hold."""
    directory = tmp_path / "new" / "directory"
    wide = "j/../ü " + "x" * 190
    written(directory, "j", SNAPSHOT, JOURNAL)
    written(directory, wide, journal=JOURNAL)
    written(directory, "..", SNAPSHOT)
    got = all_loaded(directory)
    assert set(got) == {"j", wide, ".."}
    assert same(got["j"], SNAPSHOT + JOURNAL)
    assert same(got[wide], JOURNAL)
    assert same(got[".."], SNAPSHOT)


def test_a_job_that_is_over_and_saved_stays_on_disk_until_it_is_wanted(tmp_path: Path) -> None:
    """A start decodes what is running, and what is not saved as a whole; every byte of the rest is looked at."""
    over: list[JournalRecord] = [Ended(2), LayerSnapshot("a", state_of("float32", 1))]
    written(tmp_path, "running", SNAPSHOT)
    written(tmp_path, "unsaved", over, [Ended(3)])
    written(tmp_path, "journal", (), [Ended(1)])
    path = written(tmp_path, "over", over)
    store = Store(tmp_path)
    try:
        assert set(store.load(finished=False)) == {"running", "unsaved", "journal"}
        assert (store.holds("over"), store.holds("other")) == (True, False)
        assert same(store.read("over"), over)
        assert [store.is_saved(job) for job in ("over", "running", "unsaved", "journal")] == [True, True, False, False]
        store.append("over", Ended(3))
        assert not store.is_saved("over")
        asyncio.run(store.save("over", lambda: [Ended(3)]))
        assert store.is_saved("over")
        store.release("over")
        assert not store.is_saved("over")
        assert same(store.read("over"), [Ended(3)])
    finally:
        store.close()
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    store = Store(tmp_path)
    try:
        with pytest.raises(StoreError, match=f"The snapshot {path} is corrupt"):
            store.load(finished=False)
    finally:
        store.close()


def test_jobs_of_similar_names_have_files_of_their_own(tmp_path: Path) -> None:
    """Names that only differ where a file name can't hold them."""
    names = ["x" * 199, "x" * 198 + "y", "a b", "a%20b", "A b"]
    for name in names:
        written(tmp_path, name, journal=JOURNAL[:1])
    assert sorted(all_loaded(tmp_path)) == sorted(names)


def test_a_snapshot_replaces_what_was_there(tmp_path: Path) -> None:
    """The journal does not grow for ever, and nothing else stays."""
    written(tmp_path, "j", SNAPSHOT, JOURNAL)
    written(tmp_path, "j", SNAPSHOT, JOURNAL[:1])
    assert same(all_loaded(tmp_path)["j"], SNAPSHOT + JOURNAL[:1])
    assert len(list(tmp_path.iterdir())) == 3  # the file, the lock, and the name of the directory


def test_an_entry_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    """Nothing waits in this process, which may be killed now."""
    store = Store(tmp_path)
    for count, record in enumerate(JOURNAL, 1):
        store.append("j", record)
        (job,) = (job for job in [module.loaded(store.path("j"))])
        assert len(job[1]) == count
    store.close()


def test_what_comes_while_a_snapshot_is_written_is_in_it(tmp_path: Path) -> None:
    """The new file takes the old one's place with everything that was appended meanwhile; so does the next one."""

    async def scene() -> None:
        store = Store(tmp_path)
        store.append("j", JOURNAL[0])
        saves = [asyncio.create_task(store.save("j", lambda: SNAPSHOT)) for _ in range(2)]
        await asyncio.sleep(0)  # the first one has taken its snapshot
        store.append("j", JOURNAL[1])
        assert same(module.loaded(store.path("j"))[1], JOURNAL[:2])
        await saves[0]
        assert same(module.loaded(store.path("j"))[1], [*SNAPSHOT, JOURNAL[1]])
        await saves[1]
        store.append("j", JOURNAL[2])
        store.close()

    asyncio.run(scene())
    assert same(all_loaded(tmp_path)["j"], [*SNAPSHOT, JOURNAL[2]])


def test_a_record_that_has_no_form_leaves_no_gap(tmp_path: Path) -> None:
    """Nothing is appended after it, and no snapshot that was begun before it takes the file's place."""
    impossible = Pushed(1, 2, "a", replace(state_of("float32", 1), version=2**63))

    async def scene() -> None:
        store = Store(tmp_path)
        store.append("j", JOURNAL[0])
        save = asyncio.create_task(store.save("j", lambda: SNAPSHOT))
        await asyncio.sleep(0)  # it has taken its snapshot
        could_not = r"Job 'j' could not be saved to .*: OverflowError: "
        with pytest.raises(StoreError, match=could_not):
            store.append("j", impossible)
        with pytest.raises(StoreError, match=could_not):
            await save
        store.append("j", JOURNAL[1])
        assert same(module.loaded(store.path("j"))[1], JOURNAL[:1])
        with pytest.raises(OverflowError):
            await store.save("j", lambda: [impossible])
        await store.save("j", lambda: SNAPSHOT)
        store.append("j", JOURNAL[2])
        store.close()

    asyncio.run(scene())
    assert same(all_loaded(tmp_path)["j"], [*SNAPSHOT, JOURNAL[2]])


# ---- a disk that is full ----


def _failing(directory: Path, failpoint: str) -> Store:
    store = Store(directory, Failpoints({VARIABLE: failpoint}))
    store.load()
    return store


def test_a_record_that_does_not_fit_is_reported_and_leaves_no_part(tmp_path: Path) -> None:
    """What was before is still sound, what comes later waits for a snapshot, and then the journal goes on."""
    store = _failing(tmp_path, "in-journal=full:2")
    store.append("j", JOURNAL[0])
    size = store.path("j").stat().st_size
    with pytest.raises(StoreError, match=r"Job 'j' could not be saved to .*: \[Errno 28\] No space left on device"):
        store.append("j", JOURNAL[1])
    store.append("j", JOURNAL[2])
    assert store.path("j").stat().st_size == size
    assert same(module.loaded(store.path("j"))[1], JOURNAL[:1])
    asyncio.run(store.save("j", lambda: SNAPSHOT))
    store.append("j", JOURNAL[3])
    store.close()
    assert same(all_loaded(tmp_path)["j"], [*SNAPSHOT, JOURNAL[3]])


def test_a_snapshot_that_does_not_fit_leaves_the_file_before(tmp_path: Path) -> None:
    """It was written aside; what comes later goes to the old file."""
    written(tmp_path, "j", SNAPSHOT)
    store = _failing(tmp_path, "in-snapshot=full")
    with pytest.raises(StoreError, match="could not be saved"):
        asyncio.run(store.save("j", lambda: JOURNAL))
    store.append("j", SUMS)
    store.close()
    assert same(all_loaded(tmp_path)["j"], [*SNAPSHOT, SUMS])


def test_a_job_whose_first_entry_does_not_fit_begins_with_a_snapshot(tmp_path: Path) -> None:
    """There is no file yet; nothing that came meanwhile is lost."""
    store = Store(tmp_path)
    aside = store.path("j").with_suffix(".part")
    aside.mkdir()  # stands in the way
    with pytest.raises(StoreError, match="could not be saved"):
        store.append("j", JOURNAL[0])
    store.append("j", JOURNAL[1])
    aside.rmdir()
    asyncio.run(store.save("j", lambda: SNAPSHOT))
    store.close()
    assert same(all_loaded(tmp_path)["j"], SNAPSHOT)


# ---- the directory ----


@pytest.mark.parametrize("limits", [{"long_records": 3}, {"long_bytes": 400}], ids=str)
def test_a_long_journal_asks_for_a_snapshot(tmp_path: Path, limits: dict[str, Any]) -> None:
    """By its bytes, or its entries, which take time to read back. Once, and not while one is being written."""

    async def scene() -> None:
        store = Store(tmp_path, **limits)
        for _ in range(2):
            store.append("j", SUMS)
            assert not store.long("j")
        store.append("j", SUMS)
        assert store.long("j")
        save = asyncio.create_task(store.save("j", lambda: SNAPSHOT))
        await asyncio.sleep(0)
        assert not store.long("j")
        await save
        assert not store.long("j")
        for _ in range(3):
            store.append("j", SUMS)
        store.close()
        reopened = Store(tmp_path, **limits)
        reopened.load()
        assert reopened.long("j")
        reopened.close()

    asyncio.run(scene())


def test_a_write_that_broke_off_is_in_nobodys_way(tmp_path: Path) -> None:
    """What was aside when the machine died is no snapshot."""
    path = written(tmp_path, "j", SNAPSHOT)
    path.with_suffix(".part").write_bytes(b"half")
    assert same(all_loaded(tmp_path)["j"], SNAPSHOT)
    written(tmp_path, "j", SNAPSHOT, JOURNAL)
    assert same(all_loaded(tmp_path)["j"], SNAPSHOT + JOURNAL)


def test_a_directory_that_can_not_be_made_is_reported(tmp_path: Path) -> None:
    """A file stands where the directory should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"The state directory .*file can't be used: "):
        Store(tmp_path / "file")
