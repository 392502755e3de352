"""The rim's order of things, where a test from outside could not see it fail."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bnlayer.agreement import Peer
from bnproto.failures import StatusParts
from bnproto.v1 import statistics_pb2 as pb
from bnserver.core.effects import Closed, Persist, Record
from bnserver.core.events import Event, Join, Tick
from bnserver.core.journal_records import Ended, JournalRecord, LayerSnapshot, Pushed
from bnserver.core.reasons import Reason
from bnserver.core.service import Service
from bnserver.grpc_channel import GrpcChannel
from bnserver.job_file import JobFile, StoreError, scan
from bnserver.servicer import Servicer
from bnserver.store import Store
from support.journals import state_of


class _SlowStore(Store):
    """Saves when it is told to."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.disk = asyncio.Event()

    async def save(self, job: str, records: Callable[[], Sequence[JournalRecord]]) -> None:
        await self.disk.wait()


def test_a_goodbye_is_answered_after_earlier_records_are_saved(tmp_path: Path) -> None:
    """When `leave` returns on the last rank, its job is on disk."""

    async def scene() -> None:
        store = _SlowStore(tmp_path)
        exchanges = Servicer(1, store)
        exchanges.jobs.core.handle(Join(1, "j", Peer(0), 1, 9.0, 9.0), 0.0)
        stream = GrpcChannel()
        exchanges._connect(stream)
        for effect in (Persist("j"), Closed(1, "j")):
            exchanges._handlers.of[type(effect)](effect)
        for _ in range(10):
            await asyncio.sleep(0)
        assert stream.outgoing.empty()
        store.disk.set()
        assert await stream.outgoing.get() is None
        store.close()

    asyncio.run(scene())


class _Counting(Store):
    """Counts what is read back, and what is saved."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.reads: list[str] = []
        self.saves: list[str] = []

    def read(self, job: str) -> list[JournalRecord]:
        self.reads.append(job)
        return super().read(job)

    async def save(self, job: str, records: Callable[[], Sequence[JournalRecord]]) -> None:
        self.saves.append(job)
        await super().save(job, records)


def _left_behind(
    directory: Path, jobs: dict[str, list[JournalRecord]], journal: dict[str, list[JournalRecord]]
) -> None:
    async def write() -> None:
        store = Store(directory)
        for job, records in jobs.items():
            await store.save(job, lambda records=records: records)  # type: ignore[misc]
        for job, records in journal.items():
            for record in records:
                store.append(job, record)
        store.close()

    asyncio.run(write())


async def _requests(
    *requests: pb.ExchangeRequest, hangs_up: asyncio.Event | None = None
) -> AsyncIterator[pb.ExchangeRequest]:
    for request in requests:
        yield request
    if hangs_up is not None:
        await hangs_up.wait()


def _join(job: str, rank: int = 0, world_size: int = 1, **fields: Any) -> pb.ExchangeRequest:
    join = pb.Join(job=job, rank=rank, world_size=world_size, join_timeout_ms=9000, timeout_ms=9000, **fields)
    return pb.ExchangeRequest(join=join)


def _inodes(directory: Path) -> dict[str, int]:
    """Which file stands at each name: a snapshot that is written again is another one."""
    return {path.name: path.stat().st_ino for path in directory.glob("*.job")}


def test_jobs_that_are_over_are_neither_kept_in_memory_nor_written_again(tmp_path: Path) -> None:
    """The drain wrote and synced 20,000 files that were on disk already: half a minute, where 5 s are promised."""
    over = {f"over-{number}": [Ended(1)] for number in range(100)}
    _left_behind(tmp_path, over | {"unsaved": [Ended(1)]}, {"unsaved": [Ended(2)]})  # type: ignore[arg-type]

    async def scene() -> None:
        store = _Counting(tmp_path)
        before = _inodes(tmp_path)
        exchanges = Servicer(1, store)
        await exchanges.open(1)
        assert list(exchanges.jobs.core.jobs) == ["unsaved"]
        assert exchanges.jobs.saving is not None
        await asyncio.gather(*exchanges.jobs.saving.tasks)
        assert not exchanges.jobs.core.jobs
        assert store._files == {}
        connection = exchanges._connect(GrpcChannel())
        await exchanges._read(connection, _requests(_join("running", incarnation=7)))
        assert connection.generation == 1
        await exchanges.close()
        assert (store.reads, store.saves) == ([], ["unsaved", "running"])
        after = _inodes(tmp_path)
        assert {name for name in after if after[name] != before.get(name)} == {
            store.path(job).name for job in ("unsaved", "running")
        }
        store.close()
        for task in tuple(exchanges._tasks):
            task.cancel()

    asyncio.run(scene())


def test_a_job_that_is_over_is_read_back_once_for_all_ranks_that_join_it(tmp_path: Path) -> None:
    """And leaves memory again when its next generation has ended, or where its rank was refused."""
    _left_behind(tmp_path, {"j": [Ended(4)]}, {})

    async def scene() -> None:
        store = _Counting(tmp_path)
        exchanges = Servicer(1, store)
        exchanges.jobs.accept()
        streams = [GrpcChannel() for _ in range(3)]
        connections = [exchanges._connect(stream) for stream in streams]
        await exchanges._read(connections[2], _requests(_join("j", rank=2, world_size=2)))
        assert (store.reads, exchanges.jobs.core.jobs) == (["j"], ())
        end = asyncio.Event()
        requests = [_requests(_join("j", rank, 2), hangs_up=end) for rank in (0, 1)]
        reading = [asyncio.create_task(exchanges._read(connections[rank], requests[rank])) for rank in (0, 1)]
        for stream in streams[:2]:
            joined = await stream.outgoing.get()
            assert isinstance(joined, pb.ExchangeResponse)
            assert joined.generation == 5
        assert store.reads == ["j", "j"]
        end.set()
        await asyncio.gather(*reading)
        assert exchanges.jobs.saving is not None
        await asyncio.gather(*exchanges.jobs.saving.tasks)
        assert not exchanges.jobs.core.jobs
        (ended, *_) = store.read("j")
        assert isinstance(ended, Ended)
        assert ended.generation == 5
        store.close()

    asyncio.run(scene())


def test_who_comes_too_late_hears_why_from_a_job_that_left_memory(tmp_path: Path) -> None:
    """The reason is on disk."""
    _left_behind(tmp_path, {"j": [Ended(4, Reason.PEER_LOST, "rank 1 was lost.", (1,))]}, {})

    async def scene() -> object:
        store = Store(tmp_path)
        exchanges = Servicer(1, store)
        exchanges.jobs.accept()
        stream = GrpcChannel()
        connection = exchanges._connect(stream)
        await exchanges._read(connection, _requests(_join("j", 0, 2, incarnation=7, resume=pb.Resume(generation=4))))
        store.close()
        return await stream.outgoing.get()

    status = asyncio.run(scene())
    assert isinstance(status, StatusParts)
    assert status.message == "rank 1 was lost."


def test_a_file_that_broke_meanwhile_is_named_to_who_joins_its_job(tmp_path: Path, caplog: Any) -> None:
    """It was whole when the service started; it is not replaced by a job that begins anew."""
    _left_behind(tmp_path, {"j": [Ended(4)]}, {})

    async def scene() -> tuple[object, Path]:
        store = Store(tmp_path)
        exchanges = Servicer(1, store)
        exchanges.jobs.accept()
        stream = GrpcChannel()
        connection = exchanges._connect(stream)
        store.path("j").write_bytes(b"not a snapshot at all")
        await exchanges._read(connection, _requests(_join("j")))
        store.close()
        return await stream.outgoing.get(), store.path("j")

    with caplog.at_level(logging.ERROR, "bnserver"):
        status, path = asyncio.run(scene())
    assert isinstance(status, StatusParts)
    assert status.code.name == "DATA_LOSS"
    assert status.message.startswith(f"The service can't read job 'j' back: The snapshot {path} is corrupt")
    assert str(path) in caplog.text
    assert path.read_bytes() == b"not a snapshot at all"


class _BrokenService(Service):
    """A service with a fault."""

    def handle(self, event: Event, now: float) -> list[object]:  # type: ignore[override]  # it never returns
        raise ZeroDivisionError


def test_a_fault_of_the_service_costs_one_stream(caplog: pytest.LogCaptureFixture) -> None:
    """The rank whose request met it is told, the log has the traceback, and the service goes on."""

    async def scene() -> StatusParts:
        exchanges = Servicer(1, None)
        exchanges.jobs.core = _BrokenService()
        stream = GrpcChannel()
        exchanges._connect(stream)
        exchanges.dispatch(Tick())
        exchanges.dispatch(Join(1, "j", Peer(0), 1, 9.0, 9.0))
        status = await stream.outgoing.get()
        assert isinstance(status, StatusParts)
        return status

    with caplog.at_level(logging.ERROR, "bnserver"):
        status = asyncio.run(scene())
    assert status.code.name == "INTERNAL"
    assert status.message == "The service failed at what this rank sent; its log has the traceback."
    assert caplog.messages == [
        "a fault of the service, while it handled Tick",
        "a fault of the service, while it handled Join",
    ]
    assert "ZeroDivisionError" in caplog.text


def _leaves(exchanges: Servicer, stream: GrpcChannel, job: str) -> asyncio.Task[None]:
    """A rank that joins a job, leaves it, and waits for the end of its stream."""
    requests = _requests(_join(job, incarnation=7), pb.ExchangeRequest(leave=pb.Leave()), hangs_up=asyncio.Event())
    return asyncio.create_task(exchanges._read(exchanges._connect(stream), requests))


class _Stuck(Store):
    """Saves job "stuck" when it is told to, the others as ever."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.disk = asyncio.Event()

    async def save(self, job: str, records: Callable[[], Sequence[JournalRecord]]) -> None:
        def slowly() -> Sequence[JournalRecord]:
            return records()

        if job == "stuck":
            async with self._files.setdefault(job, JobFile()).writing, self._saves:
                await self.disk.wait()
        await super().save(job, slowly)


def test_a_goodbye_waits_for_its_own_jobs_save_and_no_others(tmp_path: Path) -> None:
    """One job's snapshot took long: every rank of every job stood at its `leave`."""

    async def scene() -> None:
        store = _Stuck(tmp_path)
        exchanges = Servicer(1, store)
        exchanges.jobs.accept()
        streams, reading = {}, []
        for job in ("stuck", "quick"):
            stream = streams[job] = GrpcChannel()
            reading.append(_leaves(exchanges, stream, job))
            assert isinstance(await stream.outgoing.get(), pb.ExchangeResponse)
        assert await streams["quick"].outgoing.get() is None
        assert [job for job, records in all_saved(tmp_path).items() if isinstance(records[0], Ended)] == ["quick"]
        assert streams["stuck"].outgoing.empty()
        store.disk.set()
        assert await streams["stuck"].outgoing.get() is None
        assert list(all_saved(tmp_path)) == ["quick", "stuck"]
        for each in reading:
            each.cancel()
        store.close()

    asyncio.run(scene())


def test_a_goodbye_is_not_answered_with_success_when_the_job_is_not_on_disk(tmp_path: Path) -> None:
    """The save had ended, so the stream did, too: the rank took it for saved."""

    async def scene() -> object:
        store = Store(tmp_path)
        store.path("j").with_suffix(".part").mkdir()  # stands in the way
        exchanges = Servicer(1, store)
        exchanges.jobs.accept()
        stream = GrpcChannel()
        reading = _leaves(exchanges, stream, "j")
        assert isinstance(await stream.outgoing.get(), pb.ExchangeResponse)
        status = await stream.outgoing.get()
        reading.cancel()
        store.close()
        return status

    status = asyncio.run(scene())
    assert isinstance(status, StatusParts)
    assert status.code.name == "DATA_LOSS"
    assert re.match(r"Job 'j' could not be saved to .*: \[Errno 21\] Is a directory", status.message)


def test_a_job_that_can_not_be_encoded_costs_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its fault ended the shutdown of every job with a traceback, whatever kind of fault it was."""
    impossible = replace(state_of("float32", 1), version=2**63)

    async def scene() -> None:
        store = Store(tmp_path)
        exchanges = Servicer(1, store)
        exchanges.jobs.accept()
        for job in ("good", "bad", "other"):
            await exchanges._read(
                exchanges._connect(GrpcChannel()), _requests(_join(job, incarnation=7), hangs_up=None)
            )
        bad = exchanges.jobs.core._jobs["bad"]
        bad.layers.keep(LayerSnapshot("a", impossible))
        exchanges._handlers.of[Record](Record("bad", Pushed(0, 1, "a", impossible)))
        assert exchanges.jobs.saving is not None
        with pytest.raises(StoreError, match=r"^Job 'bad' could not be saved: OverflowError: .*\.$"):
            await exchanges.close()
        store.close()

    with caplog.at_level(logging.ERROR, "bnserver"):
        asyncio.run(scene())
    (message,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert message.getMessage().startswith("Job 'bad' could not be saved to ")
    assert message.exc_info is not None  # a fault of the service: with its traceback
    saved = all_saved(tmp_path)
    assert [job for job, records in saved.items() if any(isinstance(record, Ended) for record in records)] == [
        "good",
        "other",
    ]


def all_saved(directory: Path) -> dict[str, list[JournalRecord]]:
    """What is in the files of a directory that is in use."""
    return {job_file.job: job_file.records() for job_file in map(scan, sorted(directory.glob("*.job")))}
