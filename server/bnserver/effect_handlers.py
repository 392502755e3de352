"""Carries out the core's effects: answers are sent, records written, connections ended.

It knows the connections, the wire's messages and the disk, and decides nothing: which ranks get which answer, and which
record comes before it, the core has said. Whatever takes time (a large sum, the end of a save) is a task, so that no
effect holds up the next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from bnlayer.reduction import reduce_in_rank_order
from bnproto.failures import StatusParts, status_of
from bnserver.checkpoints import NotKeptError
from bnserver.connection import Connection
from bnserver.core.effects import (
    Broadcast,
    Checkpoint,
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
from bnserver.core.journal_records import Ended
from bnserver.core.reasons import Reason
from bnserver.counts import Counts
from bnserver.hosted_jobs import HostedJobs
from bnserver.local_listener import LocalListener
from bnserver.logs import fields
from bnserver.saving import described
from bnserver.translation import Messages, Writer, failure_of

# Adding this many bytes takes about a millisecond: not worth the way to another thread and back.
_REDUCE_HERE_BYTES = 2**20

_log = logging.getLogger("bnserver")


class EffectHandlers:
    """One handler for each kind of effect.

    Args:
        jobs: whose effects.
        connections: by number; those that have ended are not among them any more.
        writer: makes messages.
        listener: invites ranks to local sockets.
        counts: where answers and failures are counted.
        start: runs what takes time.

    Attributes:
        of: the handler of each kind.
    """

    def __init__(
        self,
        jobs: HostedJobs,
        connections: Mapping[int, Connection],
        writer: Writer,
        listener: LocalListener,
        counts: Counts,
        start: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._jobs = jobs
        self._connections = connections
        self._writer = writer
        self._listener = listener
        self._counts = counts
        self._start = start
        self.of: Mapping[type[Effect], Callable[[Any], None]] = {
            Totals: self._answer,
            Enrolled: self._answer,
            Broadcast: self._answer,
            Released: self._answer,
            Reduce: self._reduce,
            Checkpoint: self._checkpoint,
            Owned: self._owned,
            Joined: self._joined,
            Record: self._record,
            Persist: self._persist,
            Failed: self.fail,
            Closed: self._close,
            Straggling: self._log_stragglers,
        }

    # ---- answers ----

    def _joined(self, effect: Joined) -> None:
        _log.info(
            "job %r, generation %d: %d ranks",
            effect.job,
            effect.generation,
            effect.world_size,
            extra=fields(job=effect.job, generation=effect.generation, world_size=effect.world_size),
        )
        traffic = self._counts.traffic(effect.job)
        for number in effect.connections:
            connection = self._connections[number]
            connection.joined(effect.generation, effect.world_size)
            connection.traffic = traffic
            invitation = self._listener.invitation(connection)
            connection.channel.send(self._writer.joined(effect.generation, effect.world_size, invitation, effect.rank))

    def _answer(self, effect: Totals | Enrolled | Broadcast | Released) -> None:
        connections = [self._connections[number] for number in effect.connections if number in self._connections]
        if not connections:
            return
        messages = self._writer.result(effect, connections[0].generation)
        for connection in connections:
            connection.answer(messages)

    def _owned(self, effect: Owned) -> None:
        connection = self._connections.get(effect.connection)
        if connection is not None:
            connection.answer(self._writer.owned(effect, connection.generation))

    def _reduce(self, effect: Reduce) -> None:
        connections = [self._connections[number] for number in effect.connections if number in self._connections]
        generation = connections[0].generation if connections else 0

        def answer(messages: Messages) -> None:
            for connection in connections:
                connection.answer(messages)

        async def elsewhere() -> None:
            answer(await asyncio.to_thread(self._reduced, effect, generation))

        if sum(array.nbytes for arrays in effect.contributions for array in arrays) <= _REDUCE_HERE_BYTES:
            answer(self._reduced(effect, generation))
        else:
            self._start(elsewhere())

    def _reduced(self, effect: Reduce, generation: int) -> Messages:
        try:
            arrays = tuple(reduce_in_rank_order(effect.op, effect.contributions))
        except OverflowError as error:
            return self._writer.overflowed(effect.sequence, generation, str(error))
        return self._writer.reduced(effect.sequence, generation, arrays)

    # ---- what is kept ----

    def _record(self, effect: Record) -> None:
        if isinstance(effect.record, Ended):
            self._counts.ended(effect.job, effect.record)
        if self._jobs.saving is not None:
            self._jobs.saving.record(effect)

    def _persist(self, effect: Persist) -> None:
        self._jobs.retention.persist(effect)

    def _checkpoint(self, effect: Checkpoint) -> None:
        """Keep a job's layers, then answer: the ranks wait for the disk, and nobody else does."""
        connections = [self._connections[each] for each in effect.connections if each in self._connections]
        generation = connections[0].generation if connections else 0

        async def keep() -> None:
            refused, context = "", fields(job=effect.job, checkpoint=effect.name, step=effect.step)
            try:
                await self._jobs.checkpoints.write(effect)
                text = "job %r: checkpoint %r of step %d"
                _log.info(text, effect.job, effect.name, effect.step, extra=context)
            except Exception as error:  # noqa: BLE001 - the rim: the ranks wait for an answer
                refused = str(error)
                if not isinstance(error, NotKeptError):
                    refused = f"The service failed at checkpoint {effect.name!r}; its log has the traceback."
                    _log.exception("a fault of the service, at a checkpoint", extra=context)
                else:
                    _log.warning("%s", refused, extra=context)
            for connection in connections:
                connection.answer(self._writer.checkpointed(effect.sequence, generation, refused))

        self._start(keep())

    # ---- ends ----

    def fail(self, effect: Failed) -> None:
        """End a connection with an error."""
        self._counts.failed[effect.reason] += 1
        status = status_of(failure_of(effect))
        context = fields(connection=effect.connection, reason=effect.reason, ranks=effect.ranks, layer=effect.layer)
        _log.info("connection %d ends: %s: %s", effect.connection, effect.reason, status.message, extra=context)
        connection = self._connections.get(effect.connection)
        if connection is not None:
            connection.end(status)

    def _close(self, effect: Closed) -> None:
        """End a connection: a leave is answered by that, once the saves of its job in progress have ended."""
        connection = self._connections.get(effect.connection)
        if connection is None:
            return
        saving = self._jobs.saving if effect.job else None
        pending = saving.in_progress(effect.job) if saving is not None else ()
        if saving is None or not pending:
            connection.end(self._goodbye(effect.job))
            return

        async def later() -> None:
            await asyncio.wait(pending)
            connection.end(self._goodbye(effect.job))

        self._start(later())

    def _goodbye(self, job: str) -> StatusParts | None:
        """How the connection of a rank that has left ends: with an error if its job is not saved."""
        error = self._jobs.saving.unsaved.get(job) if self._jobs.saving is not None else None
        if error is None:
            return None
        return status_of(failure_of(Failed(0, Reason.DATA_LOSS, described(job, error))))

    def _log_stragglers(self, effect: Straggling) -> None:
        _log.warning("job %r: %s", effect.job, effect.text, extra=fields(job=effect.job))
