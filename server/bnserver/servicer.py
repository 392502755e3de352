"""The gRPC servicer: ranks' connections, and the way of their events to the core and of its effects back.

Each event of a connection goes to the core once, and its effects come back once: see `dispatch`. All connections run
in one event loop, so the core is never entered twice at once. It knows when connections begin and end, and when time
has passed; what a connection is, `connection` says, what an effect does, `effect_handlers`, and where the jobs are,
`hosted_jobs`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from itertools import count
from typing import Any

from google.protobuf.message import DecodeError

from bnproto.arrays import WireError
from bnproto.failures import status_of
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver.bytes_in_flight import BytesInFlight
from bnserver.connection import Connection
from bnserver.core.effects import Failed
from bnserver.core.events import Contribute, Event, Heartbeat, Stop, Tick
from bnserver.core.members import LivenessTimeouts
from bnserver.core.quotas import QuotaError, Quotas, exceeded
from bnserver.core.reasons import Reason
from bnserver.core.recovery import RecoveryError
from bnserver.core.suspend_aware_clock import TICK_S
from bnserver.counts import Counts
from bnserver.effect_handlers import EffectHandlers
from bnserver.failpoints import Failpoints
from bnserver.grpc_channel import Context, GrpcChannel, Requests, abort
from bnserver.hosted_jobs import HostedJobs
from bnserver.job_file import StoreError
from bnserver.local_listener import LocalListener
from bnserver.rank_channel import RequestAssembler
from bnserver.retention import Keep
from bnserver.saving import SavingCallback
from bnserver.store import Store
from bnserver.translation import Writer
from bnserver.unjoined import Unjoined

_SAVE_RETRY_TICKS = 10  # after a failure
_EXPIRE_TICKS = 600  # from one look at what is not kept any more to the next: a minute

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
        jobs: what it serves.
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
        timeouts = timeouts or LivenessTimeouts()
        self.counts = Counts()
        self._quotas = quotas or Quotas()
        self._in_flight = BytesInFlight(self._quotas)
        self._writer = Writer(boot_id, timeouts, durable=store is not None)
        self._failpoints = failpoints or Failpoints()
        self._report_saving = saving
        self._numbers = count(1)
        self._connections: dict[int, Connection] = {}
        self._unjoined = Unjoined()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = LocalListener(boot_id, self._failpoints)
        self.jobs = HostedJobs(store, timeouts, self._quotas, keep or Keep(), self.counts, self._report_whether_saving)
        self._handlers = EffectHandlers(
            self.jobs, self._connections, self._writer, self._listener, self.counts, self._start
        )

    async def open(self, port: int) -> None:
        """Load what was saved, and accept ranks.

        Args:
            port: that the service listens on.

        Raises:
            StoreError: a file is corrupt.
        """
        await self.jobs.load()
        await self._listener.open(port)
        self.jobs.accept()
        self._start(self._tick())

    async def close(self) -> None:
        """Notify every rank that the service stops, and save every job whose snapshot is out of date.

        Raises:
            StoreError: a job could not be saved.
        """
        self.dispatch(Stop())
        try:
            if self.jobs.saving is not None:
                await self.jobs.saving.finish()
        finally:
            await self._listener.close()

    @property
    def connections(self) -> int:
        """How many ranks are connected, joining ones included."""
        return len(self._connections)

    @property
    def local_sockets(self) -> int:
        """How many of them use a local socket."""
        return self._listener.attached

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
            connection.disconnected()

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
        await self.jobs.ready()
        self._unjoined.add(connection)
        assembler = RequestAssembler(connection.account.add)
        try:
            async for message in requests:
                assembled = assembler.add(message)
                if assembled is None:
                    continue
                if not message.HasField("join"):
                    connection.receive(*assembled)
                    continue
                self._unjoined.remove(connection)
                if not await self._recall(connection, message.join.job):
                    return
                connection.receive(*assembled)
                self.jobs.release(message.join.job)
        except (WireError, QuotaError, DecodeError) as error:
            connection.garbled(error)
            return
        # The rank closed the stream without a leave; a connection that broke cancels `Exchange` instead.
        connection.disconnected()

    async def _recall(self, connection: Connection, job: str) -> bool:
        """Load the job that a rank joins, if it is over; returns whether the rank may join."""
        try:
            await self.jobs.recall(job)
            return True
        except (StoreError, RecoveryError) as error:
            _log.error("Job %r can't be read back: %s", job, error)
            text = f"The service can't read job {job!r} back: {error}"
            self._handlers.fail(Failed(connection.number, Reason.DATA_LOSS, text))
            return False

    async def _tick(self) -> None:
        for number in count(1):
            await asyncio.sleep(TICK_S)
            self._failpoints.reached("tick")
            self.dispatch(Tick())
            if number % _SAVE_RETRY_TICKS == 0 and self.jobs.saving is not None:
                self.jobs.saving.retry()
            if number % _EXPIRE_TICKS == 1:
                self._start(self._expire())

    async def _expire(self) -> None:
        try:
            await self.jobs.retention.expire()
        except OSError as error:
            _log.error("Jobs that are over can't be forgotten: %s", error)

    # ---- through the core ----

    def dispatch(self, event: Event) -> None:
        """Let the core decide about an event, and carry out what it says."""
        try:
            began = time.monotonic()
            now = self.jobs.clock.time(began, tick=isinstance(event, Tick))
            effects = self.jobs.core.handle(event, now)
        except Exception:  # noqa: BLE001 - the outermost handler
            self._failed(event)
            return
        for effect in effects:
            try:
                self._handlers.of[type(effect)](effect)
            except Exception:  # noqa: BLE001 - the next one may be another job's
                self._failed(event)
        if effects and type(event) is Contribute:
            self.counts.handling.observe(time.monotonic() - began)

    def _failed(self, event: Event) -> None:
        """An error of the service must neither hang a rank nor end the other jobs."""
        _log.exception("a fault of the service, while it handled %s", type(event).__name__)
        number = getattr(event, "connection", None)
        if number is not None:
            text = "The service failed at what this rank sent; its log has the traceback."
            self._handlers.fail(Failed(number, Reason.INTERNAL, text))

    def _report_whether_saving(self, saving: bool) -> None:
        if self._report_saving is not None:
            self._start(self._report_saving(saving))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
