"""The gRPC servicer: turns the ranks' streams into events for the core, and carries out the core's effects.

One task per stream reads, one writes, with a queue between them, so a rank that reads slowly delays only itself. A
rank on this machine sends requests and gets answers beside its stream: `local.py`. All of them run in one event loop,
so the core is never entered twice at once.

A job that is over and saved is dropped from memory; the first rank that joins it again has it read from its file.

Journal records are written before the answers that depend on them are sent. If writing fails (a full disk), the jobs
go on in memory, the log and the health service report it, and a snapshot is tried every second until it is on disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import grpc.aio

from bnlayer.reduction import reduce_in_rank_order
from bnproto.failures import DETAILS_KEY, StatusParts, status_of
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver.core.effects import (
    ApplyUpdate,
    Closed,
    Effect,
    Failed,
    Joined,
    Owned,
    Persist,
    Record,
    Reduce,
    Straggling,
)
from bnserver.core.events import Event, Heartbeat, Lost, Malformed, Stop, Tick
from bnserver.core.journal_records import JournalRecord
from bnserver.core.members import LivenessTimeouts
from bnserver.core.reasons import Reason
from bnserver.core.recovery import RecoveryError
from bnserver.core.service import Service
from bnserver.core.suspend_aware_clock import TICK_S, SuspendAwareClock
from bnserver.failpoints import Failpoints
from bnserver.local import Callbacks, Frame, LocalSockets
from bnserver.store import Store, StoreError
from bnserver.translation import Messages, Reader, Writer, failure_of

_SAVE_AGAIN_TICKS = 10  # after a failure
# Adding this many bytes takes about a millisecond: not worth the way to another thread and back.
_REDUCE_HERE_BYTES = 2**20

_log = logging.getLogger("bnserver")

Context = grpc.aio.ServicerContext[pb.ExchangeRequest, pb.ExchangeResponse]
SavingCallback = Callable[[bool], Coroutine[Any, Any, None]]


@dataclass(slots=True)
class _Outbox:
    """The queue of one stream's writer; its last item is a status, or None for a clean end.

    Attributes:
        reader: for what the rank sends on the stream.
        beside: for what it sends on its local socket.
    """

    reader: Reader
    beside: Reader | None = None
    queue: asyncio.Queue[pb.ExchangeResponse | StatusParts | None] = field(default_factory=asyncio.Queue)
    generation: int = 0


class Servicer(rpc.StatisticsServiceServicer):
    """Serves the streams of all ranks.

    Args:
        boot_id: names this run of the service.
        store: where jobs are saved; None keeps them in memory alone.
        timeouts: how long it waits for signs of life.
        failpoints: faults to inject.
        saving: called with False when jobs can't be saved, and with True when they can again.
    """

    def __init__(
        self,
        boot_id: int,
        store: Store | None,
        *,
        timeouts: LivenessTimeouts | None = None,
        failpoints: Failpoints | None = None,
        saving: SavingCallback | None = None,
    ) -> None:
        self._timeouts = timeouts or LivenessTimeouts()
        self._writer = Writer(boot_id, self._timeouts, durable=store is not None)
        self._store = store
        self._failpoints = failpoints or Failpoints()
        self._saving = saving
        self._service = Service(timeouts=self._timeouts)
        self._clock = SuspendAwareClock(time.monotonic())
        self._ready = asyncio.Event()
        self._numbers = count(1)
        self._outboxes: dict[int, _Outbox] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._saves: set[asyncio.Task[None]] = set()
        self._due: set[str] = set()  # jobs of which a snapshot will be taken
        self._recalling = asyncio.Lock()
        self._unsaved: dict[str, StoreError] = {}
        self._sockets = LocalSockets(boot_id, Callbacks(self._asked, self._garbled, self._hung_up))

    async def open(self, port: int) -> None:
        """Load what was saved, and accept ranks.

        Args:
            port: that the service listens on.

        Raises:
            StoreError: a file is corrupt.
        """
        journals = await asyncio.to_thread(self._store.load, finished=False) if self._store is not None else {}
        now = time.monotonic()
        self._clock = SuspendAwareClock(now)
        try:
            self._service = Service(journals, self._timeouts, now)
        except RecoveryError as error:
            raise StoreError(f"The state directory holds a job that makes no sense: {error}.") from error
        for job in self._service.jobs:
            if self._service.is_over(job):  # its end is in its journal, but not in a snapshot yet
                self._persist(job)
        await self._sockets.open(port)
        self._ready.set()
        self._start(self._tick(), self._tasks)

    async def close(self) -> None:
        """Notify every rank that the service stops, and save every job whose snapshot is out of date.

        Raises:
            StoreError: a job could not be saved.
        """
        self._dispatch(Stop())
        for job in self._service.jobs:
            if self._store is not None and not self._store.is_saved(job):
                self._persist(job)
        await asyncio.gather(*self._saves)
        await self._sockets.close()
        for error in self._unsaved.values():
            raise error

    async def Exchange(  # type: ignore[override]  # the stubs allow only generators, gRPC coroutines too
        self, request_iterator: AsyncIterator[pb.ExchangeRequest], context: Context
    ) -> None:
        """One rank's stream, from join to leave."""
        stream = next(self._numbers)
        outbox = self._outboxes[stream] = _Outbox(Reader(stream))
        reading = asyncio.create_task(self._read(stream, request_iterator))
        try:
            while True:
                message = await outbox.queue.get()
                if isinstance(message, pb.ExchangeResponse):
                    if self._failpoints.reached("before-reply"):
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "dropped on purpose")
                    await context.write(message)
                    self._failpoints.reached("after-reply")
                elif message is None:
                    return
                else:
                    await context.abort(message.code, message.message, ((DETAILS_KEY, message.details),))
        finally:
            reading.cancel()
            del self._outboxes[stream]
            self._sockets.end(stream)
            self._dispatch(Lost(stream))

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        """A rank's sign of life."""
        del context
        self._dispatch(Heartbeat(request.job, request.rank, request.incarnation))
        return self._writer.heartbeat()

    async def _read(self, stream: int, requests: AsyncIterator[pb.ExchangeRequest]) -> None:
        await self._ready.wait()
        outbox = self._outboxes[stream]
        async for request in requests:
            if not request.HasField("join"):
                self._take(outbox.reader, request)
                continue
            job = request.join.job
            try:
                await self._recall(job)
            except (StoreError, RecoveryError) as error:
                _log.error("Job %r can't be read back: %s", job, error)
                self._perform(Failed(stream, Reason.DATA_LOSS, f"The service can't read job {job!r} back: {error}"))
                return
            self._take(outbox.reader, request)
            self._release(job)
        # The rank closed the stream without a leave; a connection that broke cancels `Exchange` instead.
        self._hung_up(stream)

    async def _recall(self, job: str) -> None:
        """Load a job that is over, if there is one of this name on disk.

        Raises:
            StoreError: its file is corrupt.
            RecoveryError: its records are inconsistent.
        """
        if self._store is None or self._service.knows(job):
            return
        async with self._recalling:
            if not self._service.knows(job) and self._store.holds(job):
                records = await asyncio.to_thread(self._store.read, job)
                self._service.recall(job, records, self._clock.time(time.monotonic()))

    def _release(self, job: str) -> None:
        """Drop a job from memory that is over, and saved as it is."""
        if self._store is None or job in self._due:
            return
        if self._service.is_over(job) and self._store.is_saved(job):
            self._service.forget(job)
            self._store.release(job)

    def _take(self, reader: Reader, request: pb.ExchangeRequest) -> None:
        event = reader.read(request)
        if event is not None:
            self._failpoints.reached("before-event")
            self._dispatch(event)

    def _asked(self, stream: int, request: pb.ExchangeRequest) -> None:
        """A rank sent a request on its local socket."""
        outbox = self._outboxes[stream]
        outbox.beside = outbox.beside or outbox.reader.beside()
        self._take(outbox.beside, request)

    def _garbled(self, stream: int, text: str) -> None:
        self._dispatch(Malformed(stream, text))

    def _hung_up(self, stream: int) -> None:
        """The stream or its local socket has ended: end both."""
        self._dispatch(Lost(stream))
        self._end(stream, None)

    async def _tick(self) -> None:
        for number in count(1):
            await asyncio.sleep(TICK_S)
            self._failpoints.reached("tick")
            self._dispatch(Tick())
            if number % _SAVE_AGAIN_TICKS == 0 and not self._saves:
                for job in self._unsaved:
                    self._persist(job)

    def _dispatch(self, event: Event) -> None:
        try:
            now = self._clock.time(time.monotonic(), tick=isinstance(event, Tick))
            for effect in self._service.handle(event, now):
                self._perform(effect)
        except Exception:  # noqa: BLE001 - the outermost handler
            # An error of the service must neither hang a rank nor end the other jobs.
            _log.exception("a fault of the service, while it handled %s", type(event).__name__)
            stream = getattr(event, "stream", None)
            if stream is not None:
                text = "The service failed at what this rank sent; its log has the traceback."
                self._perform(Failed(stream, Reason.INTERNAL, text))

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Joined():
                self._joined(effect)
            case Reduce():
                self._reduce(effect)
            case Owned():
                streams = (effect.stream,)
                self._send(streams, self._writer.owned(effect, self._generation(streams)))
            case Failed():
                status = status_of(failure_of(effect))
                _log.info("stream %d ends: %s: %s", effect.stream, effect.reason, status.message)
                self._end(effect.stream, status)
            case Closed():
                self._close(effect.stream)
            case Record():
                self._record(effect)
            case ApplyUpdate():
                # The answers are sent first: their writers run before this.
                asyncio.get_running_loop().call_soon(self._service.apply_update, effect.job, effect.layer)
            case Persist():
                self._persist(effect.job)
            case Straggling():
                _log.warning("job %r: %s", effect.job, effect.text)
            case _:
                self._send(effect.streams, self._writer.result(effect, self._generation(effect.streams)))

    def _joined(self, effect: Joined) -> None:
        _log.info("job %r, generation %d: %d ranks", effect.job, effect.generation, effect.world_size)
        for stream in effect.streams:
            self._outboxes[stream].generation = effect.generation
            invitation = self._sockets.invitation(stream)
            self._send((stream,), self._writer.joined(effect.generation, effect.world_size, invitation))

    def _generation(self, streams: tuple[int, ...]) -> int:
        return next((self._outboxes[stream].generation for stream in streams if stream in self._outboxes), 0)

    def _send(self, streams: tuple[int, ...], messages: Messages) -> None:
        frames: list[Frame] = []
        for stream in streams:
            outbox = self._outboxes.get(stream)
            if outbox is None:
                continue
            if self._sockets.is_active(stream):
                frames = frames or [Frame(message) for message in messages]
                self._send_locally(stream, frames)
                continue
            for message in messages:
                outbox.queue.put_nowait(message)

    def _send_locally(self, stream: int, frames: list[Frame]) -> None:
        if self._failpoints.reached("before-reply"):
            self._hung_up(stream)
            return
        self._sockets.send(stream, frames)
        self._failpoints.reached("after-reply")

    def _end(self, stream: int, status: StatusParts | None) -> None:
        outbox = self._outboxes.get(stream)
        if outbox is not None:
            outbox.queue.put_nowait(status)
        self._sockets.end(stream)

    def _close(self, stream: int) -> None:
        """Answer a leave, once a save in progress has ended."""
        if not self._saves:
            self._end(stream, None)
            return
        pending = tuple(self._saves)

        async def later() -> None:
            await asyncio.wait(pending)
            self._end(stream, None)

        self._start(later(), self._tasks)

    def _reduce(self, effect: Reduce) -> None:
        size = sum(array.nbytes for arrays in effect.contributions for array in arrays)
        if size <= _REDUCE_HERE_BYTES:
            self._send(effect.streams, self._reduced(effect, self._generation(effect.streams)))
            return

        async def elsewhere() -> None:
            generation = self._generation(effect.streams)
            messages = await asyncio.to_thread(self._reduced, effect, generation)
            self._send(effect.streams, messages)

        self._start(elsewhere(), self._tasks)

    def _reduced(self, effect: Reduce, generation: int) -> Messages:
        try:
            arrays = tuple(reduce_in_rank_order(effect.op, effect.contributions))
        except OverflowError as error:
            return self._writer.overflowed(effect.sequence, generation, str(error))
        return self._writer.reduced(effect.sequence, generation, arrays)

    def _record(self, effect: Record) -> None:
        """Append a record, without a thread: it goes to the kernel's page cache, and is not synced."""
        if self._store is None:
            return
        try:
            self._store.append(effect.job, effect.record)
        except StoreError as error:
            self._could_not_save(effect.job, error)
        if self._store.long(effect.job):
            self._persist(effect.job)

    def _persist(self, job: str) -> None:
        if self._store is not None and job not in self._due:
            self._due.add(job)
            self._start(self._save(self._store, job), self._saves)

    async def _save(self, store: Store, job: str) -> None:
        def records() -> list[JournalRecord]:
            self._due.discard(job)
            return self._service.records(job)

        try:
            await store.save(job, records)
        except StoreError as error:
            self._could_not_save(job, error)
            return
        if self._unsaved.pop(job, None) is not None:
            _log.warning("Job %r is saved again.", job)
            self._say_whether_saving()
        self._release(job)

    def _could_not_save(self, job: str, error: StoreError) -> None:
        if job not in self._unsaved:
            _log.error("%s It goes on in memory; a new attempt is made every second.", error)
        self._unsaved[job] = error
        self._say_whether_saving()

    def _say_whether_saving(self) -> None:
        if self._saving is not None:
            self._start(self._saving(not self._unsaved), self._tasks)

    def _start(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
