"""The gRPC servicer: connections' events go to the core, and the core's effects are carried out.

Each event of a connection goes to the core once, and its effects come back once: see `dispatch`. All connections run
in one event loop, so the core is never entered twice at once. What a connection is, `connection` says; `saving` keeps
the jobs on disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

from bnlayer.reduction import reduce_in_rank_order
from bnproto.arrays import WireError
from bnproto.failures import status_of
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver.channel import RequestAssembler
from bnserver.connection import Connection
from bnserver.core.effects import (
    Broadcast,
    Closed,
    Effect,
    Enrolled,
    Failed,
    Joined,
    Owned,
    Persist,
    Record,
    Reduce,
    Released,
    Straggling,
    Totals,
)
from bnserver.core.events import Event, Heartbeat, Stop, Tick
from bnserver.core.members import LivenessTimeouts
from bnserver.core.reasons import Reason
from bnserver.core.recovery import RecoveryError
from bnserver.core.service import Service
from bnserver.core.suspend_aware_clock import TICK_S, SuspendAwareClock
from bnserver.failpoints import Failpoints
from bnserver.grpc_channel import Context, GrpcChannel, Requests
from bnserver.job_file import StoreError
from bnserver.local_channel import LocalListener
from bnserver.saving import Saving, SavingCallback
from bnserver.store import Store
from bnserver.translation import Messages, Writer, failure_of

_SAVE_AGAIN_TICKS = 10  # after a failure
# Adding this many bytes takes about a millisecond: not worth the way to another thread and back.
_REDUCE_HERE_BYTES = 2**20

_log = logging.getLogger("bnserver")


class Servicer(rpc.StatisticsServiceServicer):
    """Serves the connections of all ranks.

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
        self._report_saving = saving
        self._clock = SuspendAwareClock(time.monotonic())
        self._ready = asyncio.Event()
        self._numbers = count(1)
        self._connections: dict[int, Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = LocalListener(boot_id, self._failpoints)
        self._perform: dict[type[Effect], Callable[[Any], None]] = {
            Totals: self._answer,
            Enrolled: self._answer,
            Broadcast: self._answer,
            Released: self._answer,
            Reduce: self._reduce,
            Owned: self._owned,
            Joined: self._joined,
            Failed: self._fail,
            Closed: self._close,
            Straggling: self._log_stragglers,
        }
        self._serve(Service(timeouts=self._timeouts))

    def _serve(self, service: Service) -> None:
        self._service = service
        self._saving = Saving(self._store, service, self._say_whether_saving) if self._store is not None else None
        self._perform[Record] = self._saving.record if self._saving is not None else _keep_nothing
        self._perform[Persist] = self._saving.persist if self._saving is not None else _keep_nothing

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
            self._serve(Service(journals, self._timeouts, now))
        except RecoveryError as error:
            raise StoreError(f"The state directory holds a job that makes no sense: {error}.") from error
        if self._saving is not None:
            self._saving.persist_finished()
        await self._listener.open(port)
        self._ready.set()
        self._start(self._tick())

    async def close(self) -> None:
        """Notify every rank that the service stops, and save every job whose snapshot is out of date.

        Raises:
            StoreError: a job could not be saved.
        """
        self.dispatch(Stop())
        try:
            if self._saving is not None:
                await self._saving.finish()
        finally:
            await self._listener.close()

    # ---- what comes in ----

    async def Exchange(  # type: ignore[override]  # the stubs allow only generators, gRPC coroutines too
        self, request_iterator: Requests, context: Context
    ) -> None:
        """One rank's stream, from join to leave."""
        stream = GrpcChannel()
        connection = self._connect(stream)
        reading = asyncio.create_task(self._read(connection, request_iterator))
        try:
            await stream.write(context, self._failpoints)
        finally:
            reading.cancel()
            del self._connections[connection.number]
            self._listener.revoke(connection)
            connection.lost()

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        """A rank's sign of life."""
        del context
        self.dispatch(Heartbeat(request.job, request.rank, request.incarnation))
        return self._writer.heartbeat()

    def _connect(self, stream: GrpcChannel) -> Connection:
        connection = Connection(next(self._numbers), stream, self.dispatch, self._failpoints)
        self._connections[connection.number] = connection
        return connection

    async def _read(self, connection: Connection, requests: Requests) -> None:
        """Receive what comes on the stream."""
        await self._ready.wait()
        assembler = RequestAssembler()
        try:
            async for message in requests:
                whole = assembler.add(message)
                if whole is None:
                    continue
                if message.HasField("join") and self._saving is not None:
                    if not await self._recall(self._saving, connection, message.join.job):
                        return
                    connection.receive(*whole)
                    self._saving.release(message.join.job)
                else:
                    connection.receive(*whole)
        except WireError as error:
            connection.garbled(str(error))
            return
        # The rank closed the stream without a leave; a connection that broke cancels `Exchange` instead.
        connection.lost()

    async def _recall(self, saving: Saving, connection: Connection, job: str) -> bool:
        """Load the job that a rank joins, if it is over; returns whether the rank may join."""
        try:
            await saving.recall(job, lambda: self._clock.time(time.monotonic()))
            return True
        except (StoreError, RecoveryError) as error:
            _log.error("Job %r can't be read back: %s", job, error)
            text = f"The service can't read job {job!r} back: {error}"
            self._fail(Failed(connection.number, Reason.DATA_LOSS, text))
            return False

    async def _tick(self) -> None:
        for number in count(1):
            await asyncio.sleep(TICK_S)
            self._failpoints.reached("tick")
            self.dispatch(Tick())
            if number % _SAVE_AGAIN_TICKS == 0 and self._saving is not None:
                self._saving.try_again()

    def dispatch(self, event: Event) -> None:
        """Let the core decide about an event, and carry out what it says."""
        try:
            now = self._clock.time(time.monotonic(), tick=isinstance(event, Tick))
            for effect in self._service.handle(event, now):
                self._perform[type(effect)](effect)
        except Exception:  # noqa: BLE001 - the outermost handler
            # An error of the service must neither hang a rank nor end the other jobs.
            _log.exception("a fault of the service, while it handled %s", type(event).__name__)
            stream = getattr(event, "stream", None)
            if stream is not None:
                text = "The service failed at what this rank sent; its log has the traceback."
                self._fail(Failed(stream, Reason.INTERNAL, text))

    # ---- what goes out ----

    def _joined(self, effect: Joined) -> None:
        _log.info("job %r, generation %d: %d ranks", effect.job, effect.generation, effect.world_size)
        for stream in effect.streams:
            connection = self._connections[stream]
            connection.joined(effect.generation, effect.world_size)
            invitation = self._listener.invitation(connection)
            connection.channel.send(self._writer.joined(effect.generation, effect.world_size, invitation, effect.rank))

    def _answer(self, effect: Totals | Enrolled | Broadcast | Released) -> None:
        connections = [self._connections[stream] for stream in effect.streams if stream in self._connections]
        if connections:
            messages = self._writer.result(effect, connections[0].generation)
            for connection in connections:
                connection.channel.send(messages)

    def _owned(self, effect: Owned) -> None:
        connection = self._connections.get(effect.stream)
        if connection is not None:
            connection.channel.send(self._writer.owned(effect, connection.generation))

    def _reduce(self, effect: Reduce) -> None:
        connections = [self._connections[stream] for stream in effect.streams if stream in self._connections]
        generation = connections[0].generation if connections else 0

        def send(messages: Messages) -> None:
            for connection in connections:
                connection.channel.send(messages)

        async def elsewhere() -> None:
            send(await asyncio.to_thread(self._reduced, effect, generation))

        if sum(array.nbytes for arrays in effect.contributions for array in arrays) <= _REDUCE_HERE_BYTES:
            send(self._reduced(effect, generation))
        else:
            self._start(elsewhere())

    def _reduced(self, effect: Reduce, generation: int) -> Messages:
        try:
            arrays = tuple(reduce_in_rank_order(effect.op, effect.contributions))
        except OverflowError as error:
            return self._writer.overflowed(effect.sequence, generation, str(error))
        return self._writer.reduced(effect.sequence, generation, arrays)

    def _fail(self, effect: Failed) -> None:
        status = status_of(failure_of(effect))
        _log.info("stream %d ends: %s: %s", effect.stream, effect.reason, status.message)
        connection = self._connections.get(effect.stream)
        if connection is not None:
            connection.end(status)

    def _close(self, effect: Closed) -> None:
        """End a connection, once a save in progress has ended: it may be a leave that is answered."""
        connection = self._connections.get(effect.stream)
        if connection is None:
            return
        pending = tuple(self._saving.tasks) if self._saving is not None else ()
        if not pending:
            connection.end(None)
            return

        async def later() -> None:
            await asyncio.wait(pending)
            connection.end(None)

        self._start(later())

    def _log_stragglers(self, effect: Straggling) -> None:
        _log.warning("job %r: %s", effect.job, effect.text)

    def _say_whether_saving(self, saving: bool) -> None:
        if self._report_saving is not None:
            self._start(self._report_saving(saving))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _keep_nothing(effect: Record | Persist) -> None:
    """Without a state directory."""
    del effect
