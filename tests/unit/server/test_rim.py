"""The rim's order of things, where a test from outside could not see it fail."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bnlayer.agreement import Peer
from bnproto.failures import StatusParts
from bnserver.core.effects import Closed, Persist
from bnserver.core.events import Event, Join, Tick
from bnserver.core.journal_records import JournalRecord
from bnserver.core.service import Service
from bnserver.servicer import Servicer, _Outbox
from bnserver.store import Store
from bnserver.translation import Reader


class _SlowStore(Store):
    """Saves when it is told to."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.disk = asyncio.Event()

    async def save(self, job: str, records: Callable[[], Sequence[JournalRecord]]) -> None:
        await self.disk.wait()


def test_a_goodbye_is_answered_after_what_came_before_it_is_saved(tmp_path: Path) -> None:
    """When `leave` returns on the last rank, its job is on disk."""

    async def scene() -> None:
        store = _SlowStore(tmp_path)
        exchanges = Servicer(1, store)
        exchanges._service.handle(Join(1, "j", Peer(0), 1, 9.0, 9.0), 0.0)
        outbox = exchanges._outboxes[1] = _Outbox(Reader(1))
        exchanges._perform(Persist("j"))
        exchanges._perform(Closed(1))
        for _ in range(10):
            await asyncio.sleep(0)
        assert outbox.queue.empty()
        store.disk.set()
        assert await outbox.queue.get() is None
        store.close()

    asyncio.run(scene())


class _BrokenService(Service):
    """A service with a fault."""

    def handle(self, event: Event, now: float) -> list[object]:  # type: ignore[override]  # it never returns
        raise ZeroDivisionError


def test_a_fault_of_the_service_costs_one_stream(caplog: pytest.LogCaptureFixture) -> None:
    """The rank whose request met it is told, the log has the traceback, and the service goes on."""

    async def scene() -> StatusParts:
        exchanges = Servicer(1, None)
        exchanges._service = _BrokenService()
        outbox = exchanges._outboxes[1] = _Outbox(Reader(1))
        exchanges._dispatch(Tick())
        exchanges._dispatch(Join(1, "j", Peer(0), 1, 9.0, 9.0))
        status = await outbox.queue.get()
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
