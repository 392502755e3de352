"""The gRPC servicer: connections' events go to the core, and the core's effects are carried out.

Each event of a connection goes to the core once, and its effects come back once: see `dispatch`. All connections run
in one event loop, so the core is never entered twice at once. What a connection is, `connection` says; `saving` keeps
the jobs on disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from bnlayer.reduction import reduce_in_rank_order
from bnlayer.state import LayerState
from bnproto.arrays import WireError
from bnproto.failures import StatusParts, status_of
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver.bytes_in_flight import BytesInFlight
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
from bnserver.core.events import Contribute, Event, Heartbeat, Stop, Tick
from bnserver.core.journal_records import Ended
from bnserver.core.members import LivenessTimeouts
from bnserver.core.observation import JobObservation
from bnserver.core.quotas import QuotaError, Quotas, exceeded
from bnserver.core.reasons import Reason
from bnserver.core.recovery import RecoveryError
from bnserver.core.service import Service
from bnserver.core.suspend_aware_clock import TICK_S, SuspendAwareClock
from bnserver.counts import Counts
from bnserver.failpoints import Failpoints
from bnserver.grpc_channel import Context, GrpcChannel, Requests, abort
from bnserver.job_file import StoreError
from bnserver.local_listener import LocalListener
from bnserver.logs import fields
from bnserver.retention import Keep, MemoryRetention
from bnserver.saving import Saving, SavingCallback, described
from bnserver.store import Store
from bnserver.translation import Messages, Writer, failure_of
from bnserver.unjoined import Unjoined

_SAVE_AGAIN_TICKS = 10  # after a failure
_EXPIRE_TICKS = 600  # from one look at what is not kept any more to the next: a minute
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
        keep: what is kept of jobs that are over; None: everything.
        quotas: how much one job may use, and all together.

    Attributes:
        counts: what happens here.
    """

    def __init__(
        self,
        boot_id: int,
        store: Store | None,
        *,
        timeouts: LivenessTimeouts | None = None,
        failpoints: Failpoints | None = None,
        saving: SavingCallback | None = None,
        keep: Keep | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self.counts = Counts()
        self._quotas = quotas or Quotas()
        self._in_flight = BytesInFlight(self._quotas)
        self._timeouts = timeouts or LivenessTimeouts()
        self._writer = Writer(boot_id, self._timeouts, durable=store is not None)
        self._store = store
        self._failpoints = failpoints or Failpoints()
        self._report_saving = saving
        self._keep = keep or Keep()
        self._clock = SuspendAwareClock(time.monotonic())
        self._ready = asyncio.Event()
        self._numbers = count(1)
        self._connections: dict[int, Connection] = {}
        self._unjoined = Unjoined()
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
        self._serve(Service(timeouts=self._timeouts, quotas=self._quotas))

    def _serve(self, service: Service) -> None:
        self._service = service
        self._saving: Saving | None = None
        if self._store is None:
            self._retention: Saving | MemoryRetention = MemoryRetention(self._keep, service)
        else:
            self._saving = Saving(self._store, service, self._say_whether_saving, self._keep, self.counts)
            self._retention = self._saving
        self._perform[Record] = self._record
        self._perform[Persist] = self._retention.persist

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
            self._serve(Service(journals, self._timeouts, now, self._quotas))
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

    # ---- what can be seen ----

    @property
    def connections(self) -> int:
        """How many ranks are connected, joining ones included."""
        return len(self._connections)

    @property
    def local_sockets(self) -> int:
        """How many of them use a local socket."""
        return self._listener.attached

    @property
    def unsaved(self) -> int:
        """How many jobs could not be saved, and are tried again."""
        return len(self._saving.unsaved) if self._saving is not None else 0

    @property
    def active(self) -> Sequence[str]:
        """The names of the jobs that are not over."""
        return self._service.active

    @property
    def kept(self) -> int:
        """How many jobs are in memory, and over."""
        return len(self._service.jobs) - len(self._service.active)

    def observe(self, jobs: Iterable[str]) -> Iterator[JobObservation]:
        """What there is to see of those jobs that are not over."""
        now = self._clock.time(time.monotonic())
        for job in jobs:
            if self._service.is_active(job):
                yield self._service.observe(job, now)

    def is_active(self, job: str) -> bool:
        """Whether a job is not over."""
        return self._service.is_active(job)

    async def states(self, job: str) -> Mapping[str, LayerState] | None:
        """The owner's states of a job, by layer; None if there is no such job. One that is over may be read for it.

        Raises:
            StoreError: its file is corrupt.
            RecoveryError: its records are inconsistent.
        """
        await self._ready.wait()
        if self._saving is None or self._service.knows(job):
            return self._service.states(job) if self._service.knows(job) else None
        await self._saving.recall(job, lambda: self._clock.time(time.monotonic()))
        if not self._service.knows(job):
            return None
        states = self._service.states(job)
        self._saving.release(job)
        return states

    # ---- what comes in ----

    async def Exchange(  # type: ignore[override]  # the stubs allow only generators, gRPC coroutines too
        self, request_iterator: Requests, context: Context
    ) -> None:
        """One rank's stream, from join to leave."""
        number = len(self._connections) + 1
        if number > self._quotas.connections:
            text = exceeded("connections", self._quotas.connections, number, "--max-connections")
            refused = f"The service refused this connection: {text}."
            await abort(context, status_of(pb.Failure(reason=pb.ERROR_REASON_QUOTA, text=refused)))
        stream = GrpcChannel()
        connection = self._connect(stream)
        reading = asyncio.create_task(self._read(connection, request_iterator))
        try:
            await stream.write(context, self._failpoints)
        finally:
            reading.cancel()
            del self._connections[connection.number]
            self._unjoined.remove(connection)
            self._listener.revoke(connection)
            connection.lost()

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        """A rank's sign of life."""
        del context
        self.dispatch(Heartbeat(request.job, request.rank, request.incarnation))
        return self._writer.heartbeat()

    def _connect(self, stream: GrpcChannel) -> Connection:
        connection = Connection(
            next(self._numbers), stream, self.dispatch, self._failpoints, self._quotas, self._in_flight
        )
        self._connections[connection.number] = connection
        return connection

    async def _read(self, connection: Connection, requests: Requests) -> None:
        """Receive what comes on the stream."""
        await self._ready.wait()
        self._unjoined.add(connection)
        assembler = RequestAssembler(connection.account)
        try:
            async for message in requests:
                whole = assembler.add(message)
                if whole is None:
                    continue
                if not message.HasField("join"):
                    connection.receive(*whole)
                    continue
                self._unjoined.remove(connection)
                if self._saving is None:
                    connection.receive(*whole)
                elif await self._recall(self._saving, connection, message.join.job):
                    connection.receive(*whole)
                    self._saving.release(message.join.job)
                else:
                    return
        except (WireError, QuotaError) as error:
            connection.garbled(error)
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
            if number % _EXPIRE_TICKS == 1:
                self._start(self._expire())

    async def _expire(self) -> None:
        try:
            await self._retention.expire()
        except OSError as error:
            _log.error("Jobs that are over can't be forgotten: %s", error)

    def dispatch(self, event: Event) -> None:
        """Let the core decide about an event, and carry out what it says."""
        try:
            began = time.monotonic()
            now = self._clock.time(began, tick=isinstance(event, Tick))
            effects = self._service.handle(event, now)
        except Exception:  # noqa: BLE001 - the outermost handler
            self._failed(event)
            return
        for effect in effects:
            try:
                self._perform[type(effect)](effect)
            except Exception:  # noqa: BLE001 - the next one may be another job's
                self._failed(event)
        if effects and type(event) is Contribute:
            self.counts.handling.observe(time.monotonic() - began)

    def _failed(self, event: Event) -> None:
        """An error of the service must neither hang a rank nor end the other jobs."""
        _log.exception("a fault of the service, while it handled %s", type(event).__name__)
        stream = getattr(event, "stream", None)
        if stream is not None:
            text = "The service failed at what this rank sent; its log has the traceback."
            self._fail(Failed(stream, Reason.INTERNAL, text))

    # ---- what goes out ----

    def _joined(self, effect: Joined) -> None:
        _log.info(
            "job %r, generation %d: %d ranks",
            effect.job,
            effect.generation,
            effect.world_size,
            extra=fields(job=effect.job, generation=effect.generation, world_size=effect.world_size),
        )
        traffic = self.counts.traffic(effect.job)
        for stream in effect.streams:
            connection = self._connections[stream]
            connection.joined(effect.generation, effect.world_size)
            connection.traffic = traffic
            invitation = self._listener.invitation(connection)
            connection.channel.send(self._writer.joined(effect.generation, effect.world_size, invitation, effect.rank))

    def _answer(self, effect: Totals | Enrolled | Broadcast | Released) -> None:
        connections = [self._connections[stream] for stream in effect.streams if stream in self._connections]
        if connections:
            _send(self._writer.result(effect, connections[0].generation), connections)

    def _owned(self, effect: Owned) -> None:
        connection = self._connections.get(effect.stream)
        if connection is not None:
            _send(self._writer.owned(effect, connection.generation), [connection])

    def _reduce(self, effect: Reduce) -> None:
        connections = [self._connections[stream] for stream in effect.streams if stream in self._connections]
        generation = connections[0].generation if connections else 0

        async def elsewhere() -> None:
            _send(await asyncio.to_thread(self._reduced, effect, generation), connections)

        if sum(array.nbytes for arrays in effect.contributions for array in arrays) <= _REDUCE_HERE_BYTES:
            _send(self._reduced(effect, generation), connections)
        else:
            self._start(elsewhere())

    def _reduced(self, effect: Reduce, generation: int) -> Messages:
        try:
            arrays = tuple(reduce_in_rank_order(effect.op, effect.contributions))
        except OverflowError as error:
            return self._writer.overflowed(effect.sequence, generation, str(error))
        return self._writer.reduced(effect.sequence, generation, arrays)

    def _record(self, effect: Record) -> None:
        if isinstance(effect.record, Ended):
            self.counts.ended(effect.job, effect.record)
        if self._saving is not None:
            self._saving.record(effect)

    def _fail(self, effect: Failed) -> None:
        self.counts.failed[effect.reason] += 1
        status = status_of(failure_of(effect))
        said = fields(stream=effect.stream, reason=effect.reason, ranks=effect.ranks, layer=effect.layer)
        _log.info("stream %d ends: %s: %s", effect.stream, effect.reason, status.message, extra=said)
        connection = self._connections.get(effect.stream)
        if connection is not None:
            connection.end(status)

    def _close(self, effect: Closed) -> None:
        """End a connection: a leave is answered by that, once the saves of its job in progress have ended."""
        connection = self._connections.get(effect.stream)
        if connection is None:
            return
        saving = self._saving if effect.job else None
        pending = saving.in_progress(effect.job) if saving is not None else ()
        if saving is None or not pending:
            connection.end(self._goodbye(effect.job))
            return

        async def later() -> None:
            await asyncio.wait(pending)
            connection.end(self._goodbye(effect.job))

        self._start(later())

    def _goodbye(self, job: str) -> StatusParts | None:
        """How the stream of a rank that has left ends: with an error if its job is not saved."""
        error = self._saving.unsaved.get(job) if self._saving is not None else None
        if error is None:
            return None
        return status_of(failure_of(Failed(0, Reason.DATA_LOSS, described(job, error))))

    def _log_stragglers(self, effect: Straggling) -> None:
        _log.warning("job %r: %s", effect.job, effect.text, extra=fields(job=effect.job))

    def _say_whether_saving(self, saving: bool) -> None:
        if self._report_saving is not None:
            self._start(self._report_saving(saving))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _send(messages: Messages, connections: Sequence[Connection]) -> None:
    """Send an answer to ranks of one job."""
    size = messages[0].payload_bytes
    for connection in connections:
        connection.traffic.sent += size
        connection.answer(messages)
