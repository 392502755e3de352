"""What is loaded is what was written, or an error that names the file."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer.agreement import Peer
from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.renorm import Renorm
from bnlayer.state import LayerState
from bnproto.v1 import journal_pb2 as pb
from bnserver import store as module
from bnserver.core.events import Replacing
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
from bnserver.journal_encoding import decode, encode, encode_header, framed
from bnserver.store import Store, StoreError


def _state(dtype: str, channels: int) -> LayerState:
    grid = Grid(dtype, np.linspace(-1e30, 3, channels), np.arange(channels) - 160, True)
    backward = BackwardGrid(dtype, np.arange(channels), np.arange(channels) - 5, False)
    mean = np.linspace(-1, 1, channels).astype(dtype)
    return LayerState(Moving(mean, mean**2), grid, backward, 2**40)


_SIGNATURE = LayerSignature(1, "float32", 0.9, 0.001, renorm=Renorm(0.9, rmax=3.0))
_ENROLLED = Completed(
    2**40, Call(Operation.ENROLL, ExchangeKey("a", None, 0), _SIGNATURE), _state("float32", 1), known=True
)
_SUMS = Completed(
    7,
    Call(
        Operation.SUMS,
        ExchangeKey("ü", Direction.BACKWARD, 3),
        replace(_SIGNATURE, grid=2**62, update_moving=False),
        2,
        7,
    ),
    np.array([[-(2**63)], [2**63 - 1]]),
)
_SET = Completed(
    8,
    Call(Operation.PROBE, ExchangeKey("ü", Direction.FORWARD, 3), replace(_SIGNATURE, state=2**62)),
    Replacing(np.array([[5], [-6]]), _state("float32", 1)),
)
_SNAPSHOT: list[JournalRecord] = [
    Ended(2, Reason.DATA_LOSS, "text ü", (0, 3)),
    LayerSnapshot("a", _state("float32", 1)),
    Began(3, 2, (MemberRecord(Peer(0, "h", 7), 2**63 - 1, 300.0, 4), MemberRecord(Peer(1, "h", 8), 5, 0.25))),
]
_JOURNAL: list[JournalRecord] = [
    _ENROLLED,
    _SUMS,
    _SET,
    Pushed(1, 9, "b\n", _state("float64", 3)),
    Left(3, 1, ""),
    Ended(3),
]


def _same(got: Sequence[JournalRecord], expected: Sequence[JournalRecord]) -> bool:
    """Whether entries are equal, bits included: their bytes are."""
    return list(map(encode, got)) == list(map(encode, expected))


def _written(
    directory: Path, job: str = "j", snapshot: Sequence[JournalRecord] = (), journal: Sequence[JournalRecord] = ()
) -> Path:
    """A state directory as a daemon leaves it; returns the job's file."""
    store = Store(directory)
    store.load()
    if snapshot:
        asyncio.run(store.save(job, lambda: snapshot))
    for record in journal:
        store.append(job, record)
    store.close()
    return store.path(job)


def _loaded(directory: Path) -> dict[str, list[JournalRecord]]:
    store = Store(directory)
    try:
        return store.load()
    finally:
        store.close()


# ---- what is written ----


@pytest.mark.parametrize("record", [*_SNAPSHOT, *_JOURNAL], ids=lambda record: type(record).__name__)
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
    _written(directory, "j", _SNAPSHOT, _JOURNAL)
    _written(directory, wide, journal=_JOURNAL)
    _written(directory, "..", _SNAPSHOT)
    got = _loaded(directory)
    assert set(got) == {"j", wide, ".."}
    assert _same(got["j"], _SNAPSHOT + _JOURNAL)
    assert _same(got[wide], _JOURNAL)
    assert _same(got[".."], _SNAPSHOT)


def test_a_job_that_is_over_and_saved_stays_on_disk_until_it_is_wanted(tmp_path: Path) -> None:
    """A start decodes what is running, and what is not saved as a whole; every byte of the rest is looked at."""
    over: list[JournalRecord] = [Ended(2), LayerSnapshot("a", _state("float32", 1))]
    _written(tmp_path, "running", _SNAPSHOT)
    _written(tmp_path, "unsaved", over, [Ended(3)])
    _written(tmp_path, "journal", (), [Ended(1)])
    path = _written(tmp_path, "over", over)
    store = Store(tmp_path)
    try:
        assert set(store.load(finished=False)) == {"running", "unsaved", "journal"}
        assert (store.holds("over"), store.holds("other")) == (True, False)
        assert _same(store.read("over"), over)
        assert [store.is_saved(job) for job in ("over", "running", "unsaved", "journal")] == [True, True, False, False]
        store.append("over", Ended(3))
        assert not store.is_saved("over")
        asyncio.run(store.save("over", lambda: [Ended(3)]))
        assert store.is_saved("over")
        store.release("over")
        assert not store.is_saved("over")
        assert _same(store.read("over"), [Ended(3)])
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
        _written(tmp_path, name, journal=_JOURNAL[:1])
    assert sorted(_loaded(tmp_path)) == sorted(names)


def test_a_snapshot_replaces_what_was_there(tmp_path: Path) -> None:
    """The journal does not grow for ever, and nothing else stays."""
    _written(tmp_path, "j", _SNAPSHOT, _JOURNAL)
    _written(tmp_path, "j", _SNAPSHOT, _JOURNAL[:1])
    assert _same(_loaded(tmp_path)["j"], _SNAPSHOT + _JOURNAL[:1])
    assert len(list(tmp_path.iterdir())) == 2  # the file and the lock


def test_an_entry_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    """Nothing waits in this process, which may be killed now."""
    store = Store(tmp_path)
    for count, record in enumerate(_JOURNAL, 1):
        store.append("j", record)
        (job,) = (job for job in [module._loaded(store.path("j"))])
        assert len(job[1]) == count
    store.close()


def test_what_comes_while_a_snapshot_is_written_is_in_it(tmp_path: Path) -> None:
    """The new file takes the old one's place with everything that was appended meanwhile; so does the next one."""

    async def scene() -> None:
        store = Store(tmp_path)
        store.append("j", _JOURNAL[0])
        saves = [asyncio.create_task(store.save("j", lambda: _SNAPSHOT)) for _ in range(2)]
        await asyncio.sleep(0)  # the first one has taken its snapshot
        store.append("j", _JOURNAL[1])
        assert _same(module._loaded(store.path("j"))[1], _JOURNAL[:2])
        await saves[0]
        assert _same(module._loaded(store.path("j"))[1], [*_SNAPSHOT, _JOURNAL[1]])
        await saves[1]
        store.append("j", _JOURNAL[2])
        store.close()

    asyncio.run(scene())
    assert _same(_loaded(tmp_path)["j"], [*_SNAPSHOT, _JOURNAL[2]])


# ---- what a disk may do to it ----


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Silent loss of a bit would be silent loss of the run: in the snapshot, and in the journal after it."""
    path = _written(tmp_path, "j", _SNAPSHOT, _JOURNAL)
    data = path.read_bytes()
    store = Store(tmp_path)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x20
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match="is corrupt"):
            store.load()
        assert path.read_bytes() == flipped
    store.close()


def test_a_file_cut_at_every_byte_is_what_was_before_or_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A snapshot that lacks its end was never in place; of a journal the last entry was being written."""
    whole = _written(tmp_path, "j", _SNAPSHOT, _JOURNAL).read_bytes()
    begins = [len(_written(tmp_path, "j", _SNAPSHOT, _JOURNAL[:count]).read_bytes()) for count in range(6)]
    path = tmp_path / _written(tmp_path).name
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        caplog.clear()
        if length < begins[0]:
            with pytest.raises(StoreError, match="is corrupt"):
                _loaded(tmp_path)
            continue
        kept = max(count for count in range(6) if begins[count] <= length)
        store = Store(tmp_path)
        assert _same(store.load()["j"], _SNAPSHOT + _JOURNAL[:kept])
        assert len(caplog.messages) == (length not in begins)  # what is cut off is told
        store.append("j", _SUMS)  # and it goes on from there
        store.close()
        assert _same(_loaded(tmp_path)["j"], [*_SNAPSHOT, *_JOURNAL[:kept], _SUMS])


def test_after_a_power_cut_the_end_of_a_journal_may_be_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was never synced is read as far as it is sound, and the log says so; the snapshot was synced."""
    monkeypatch.setattr(module, "_machine", lambda: "before the power cut")
    path = _written(tmp_path, "j", _SNAPSHOT, _JOURNAL)
    synced = len(_written(tmp_path / "other", "j", _SNAPSHOT).read_bytes())
    monkeypatch.setattr(module, "_machine", lambda: "after it")
    data = path.read_bytes()
    for position in range(0, len(data), 5):
        path.write_bytes(data[:position] + bytes(len(data) - position))
        caplog.clear()
        if position < synced:
            with pytest.raises(StoreError, match="is corrupt"):
                _loaded(tmp_path)
        else:
            records = _loaded(tmp_path)["j"]
            assert _same(records, (_SNAPSHOT + _JOURNAL)[: len(records)])
            assert caplog.messages[0].startswith(f"{path} ends at byte ")


def test_a_corrupt_file_says_what_to_do(tmp_path: Path) -> None:
    """The error names the file, the fault and both ways out."""
    path = tmp_path / "j.job"
    path.write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        _loaded(tmp_path)
    assert str(caught.value) == (
        f"The snapshot {path} is corrupt: it is empty. Put a good copy in its place; or move it away, and its job "
        "begins anew, without its moving statistics."
    )


@pytest.mark.parametrize(
    ("bodies", "text"),
    [
        ([encode_header(pb.Header(format=9, job="j"))], "expected the format 1, found 9"),
        ([encode(_JOURNAL[0])], "it does not begin with a header"),
        ([encode_header(pb.Header(format=1, job="j"))] * 2, "a second header stands in its middle"),
        ([encode_header(pb.Header(format=1, job="j", synced=3))], "it has 1 of the 3 records of its snapshot"),
        ([encode_header(pb.Header(format=1, job="j")), b""], "expected an entry that this version knows, found None"),
        ([encode_header(pb.Header(format=1, job="j")), b"\xff"], "a record makes no sense"),
    ],
)
def test_a_file_of_another_kind_is_not_taken(tmp_path: Path, bodies: list[bytes], text: str) -> None:
    """Its checksums hold, but it is not what this version writes."""
    (tmp_path / "x.job").write_bytes(b"".join(framed(number, body) for number, body in enumerate(bodies)))
    with pytest.raises(StoreError, match=text):
        _loaded(tmp_path)


def test_frames_can_not_be_taken_out_or_moved(tmp_path: Path) -> None:
    """Each is sound by itself; their numbers are not."""
    header = framed(0, encode_header(pb.Header(format=1, job="j", machine=module._machine())))
    path = tmp_path / "x.job"
    for numbers in ((2,), (1, 1), (2, 1)):
        path.write_bytes(header + b"".join(framed(number, encode(_SUMS)) for number in numbers))
        with pytest.raises(StoreError, match="does not begin as one"):
            _loaded(tmp_path)


# ---- a disk that is full ----


def _failing(directory: Path, failpoint: str) -> Store:
    store = Store(directory, Failpoints({VARIABLE: failpoint}))
    store.load()
    return store


def test_a_record_that_does_not_fit_is_reported_and_leaves_no_part(tmp_path: Path) -> None:
    """What was before is still sound, what comes later waits for a snapshot, and then the journal goes on."""
    store = _failing(tmp_path, "in-journal=full:2")
    store.append("j", _JOURNAL[0])
    size = store.path("j").stat().st_size
    with pytest.raises(StoreError, match=r"Job 'j' could not be saved to .*: \[Errno 28\] No space left on device"):
        store.append("j", _JOURNAL[1])
    store.append("j", _JOURNAL[2])
    assert store.path("j").stat().st_size == size
    assert _same(module._loaded(store.path("j"))[1], _JOURNAL[:1])
    asyncio.run(store.save("j", lambda: _SNAPSHOT))
    store.append("j", _JOURNAL[3])
    store.close()
    assert _same(_loaded(tmp_path)["j"], [*_SNAPSHOT, _JOURNAL[3]])


def test_a_snapshot_that_does_not_fit_leaves_the_file_before(tmp_path: Path) -> None:
    """It was written aside; what comes later goes to the old file."""
    _written(tmp_path, "j", _SNAPSHOT)
    store = _failing(tmp_path, "in-snapshot=full")
    with pytest.raises(StoreError, match="could not be saved"):
        asyncio.run(store.save("j", lambda: _JOURNAL))
    store.append("j", _SUMS)
    store.close()
    assert _same(_loaded(tmp_path)["j"], [*_SNAPSHOT, _SUMS])


def test_a_job_whose_first_entry_does_not_fit_begins_with_a_snapshot(tmp_path: Path) -> None:
    """There is no file yet; nothing that came meanwhile is lost."""
    store = Store(tmp_path)
    aside = store.path("j").with_suffix(".part")
    aside.mkdir()  # stands in the way
    with pytest.raises(StoreError, match="could not be saved"):
        store.append("j", _JOURNAL[0])
    store.append("j", _JOURNAL[1])
    aside.rmdir()
    asyncio.run(store.save("j", lambda: _SNAPSHOT))
    store.close()
    assert _same(_loaded(tmp_path)["j"], _SNAPSHOT)


# ---- the directory ----


@pytest.mark.parametrize("limits", [{"long_entries": 3}, {"long_bytes": 400}], ids=str)
def test_a_long_journal_asks_for_a_snapshot(tmp_path: Path, limits: dict[str, Any]) -> None:
    """By its bytes, or its entries, which take time to read back. Once, and not while one is being written."""

    async def scene() -> None:
        store = Store(tmp_path, **limits)
        for _ in range(2):
            store.append("j", _SUMS)
            assert not store.long("j")
        store.append("j", _SUMS)
        assert store.long("j")
        save = asyncio.create_task(store.save("j", lambda: _SNAPSHOT))
        await asyncio.sleep(0)
        assert not store.long("j")
        await save
        assert not store.long("j")
        for _ in range(3):
            store.append("j", _SUMS)
        store.close()
        again = Store(tmp_path, **limits)
        again.load()
        assert again.long("j")
        again.close()

    asyncio.run(scene())


def test_a_write_that_broke_off_is_in_nobodys_way(tmp_path: Path) -> None:
    """What was aside when the machine died is no snapshot."""
    path = _written(tmp_path, "j", _SNAPSHOT)
    path.with_suffix(".part").write_bytes(b"half")
    assert _same(_loaded(tmp_path)["j"], _SNAPSHOT)
    _written(tmp_path, "j", _SNAPSHOT, _JOURNAL)
    assert _same(_loaded(tmp_path)["j"], _SNAPSHOT + _JOURNAL)


def test_a_directory_that_can_not_be_made_is_reported(tmp_path: Path) -> None:
    """A file stands where the directory should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"The state directory .*file can't be used: "):
        Store(tmp_path / "file")
