"""The servicer of observers: `bnlayer jobs`, evaluators, inference servers.

A reader asks, and is answered once. What it does not ask for is not sent, so a slow one neither fills a buffer here nor
gets values that are out of date. Ranks do not notice it: nothing is done when an exchange completes. For a reader that
waits for a change, the service looks ten times a second whether there is one, which compares one reference a layer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from zlib import crc32

import grpc.aio

from bnlayer.moving import Moving
from bnlayer.state import LayerState
from bnproto.arrays import pack
from bnproto.calls import direction_of, operation_of
from bnproto.failures import status_of
from bnproto.v1 import observation_pb2 as pb
from bnproto.v1 import observation_pb2_grpc as rpc
from bnproto.v1 import statistics_pb2 as wire
from bnserver.admission import grant_of_call
from bnserver.core.generation import Phase
from bnserver.core.observation import JobObservation, RankObservation
from bnserver.core.recovery import RecoveryError
from bnserver.grpc_channel import abort
from bnserver.hosted_jobs import HostedJobs
from bnserver.job_file import StoreError

_READERS = 256  # that wait at a time
_LOOK_EVERY_S = 0.1
_LONGEST_WAIT_S = 30.0
_MOST_RANKS = 1000  # of a job that is listed: a message has 4 MiB

_PHASES = {
    Phase.JOINING: pb.JOB_PHASE_JOINING,
    Phase.RUNNING: pb.JOB_PHASE_RUNNING,
    Phase.RECOVERING: pb.JOB_PHASE_RECOVERING,
}

_ListContext = grpc.aio.ServicerContext[pb.ListJobsRequest, pb.ListJobsResponse]
_ReadContext = grpc.aio.ServicerContext[pb.ReadStatisticsRequest, pb.ReadStatisticsResponse]


class ObservationServicer(rpc.ObservationServiceServicer):
    """Serves observers.

    Args:
        jobs: of the service.
    """

    def __init__(self, jobs: HostedJobs) -> None:
        self._jobs = jobs
        self._readers = 0
        self._is_closed = False

    def close(self) -> None:
        """The service stops: readers that wait get an error."""
        self._is_closed = True

    async def ListJobs(  # type: ignore[override]  # the stubs allow only generators, gRPC coroutines too
        self, request: pb.ListJobsRequest, context: _ListContext
    ) -> None:
        """The jobs that are not over: those of the token that is shown."""
        del request
        grant = grant_of_call.get()
        for job in self._jobs.active:
            if grant is None or grant.covers(job):
                for seen in self._jobs.observe([job]):
                    await context.write(pb.ListJobsResponse(job=_job(seen)))

    async def ReadStatistics(  # type: ignore[override]  # likewise
        self, request: pb.ReadStatisticsRequest, context: _ReadContext
    ) -> None:
        """The moving statistics of a job, once they are others than the reader has."""
        if self._readers >= _READERS:
            await _refuse(
                context,
                wire.ERROR_REASON_QUOTA,
                f"{_READERS} readers wait for statistics already, the most that this service takes. Try again later, "
                "or let fewer processes follow.",
            )
        self._readers += 1
        try:
            await self._read(request, context)
        except (StoreError, RecoveryError) as error:
            await _refuse(
                context, wire.ERROR_REASON_DATA_LOSS, f"The service can't read job {request.job!r} back: {error}"
            )
        finally:
            self._readers -= 1

    async def _read(self, request: pb.ReadStatisticsRequest, context: _ReadContext) -> None:
        deadline = time.monotonic() + min(request.wait_ms / 1000, _LONGEST_WAIT_S)
        reader = _Reader(request)
        is_active = self._jobs.is_active(request.job)
        states = await self._jobs.states(request.job)
        while not reader.lacks(states) and time.monotonic() < deadline and (is_active or request.forever):
            await asyncio.sleep(_LOOK_EVERY_S)
            was_active, is_active = is_active, self._jobs.is_active(request.job)
            if was_active or is_active:
                states = await self._jobs.states(request.job)
            if self._is_closed:
                await _refuse(context, wire.ERROR_REASON_STOPPING, "The service is stopping.")
        for layer, state, stamp in reader.changed:
            payload, parts = pack(state.moving.values, tuple(state.moving.vectors))
            statistics = pb.LayerStatistics(layer=layer, version=state.version, payload=payload, stamp=stamp)
            await context.write(pb.ReadStatisticsResponse(statistics=statistics))
            for part in parts:
                await context.write(pb.ReadStatisticsResponse(part=part))
        seen = pb.JobSeen(known=states is not None, over=not is_active)
        await context.write(pb.ReadStatisticsResponse(job=seen))


class _Reader:
    """What a reader has, and what it lacks.

    Attributes:
        changed: name, state and stamp of the layers whose statistics are others than it has.
    """

    def __init__(self, request: pb.ReadStatisticsRequest) -> None:
        self.changed: list[tuple[str, LayerState, bytes]] = []
        self._layers = frozenset(request.layers)
        self._stamps = dict(request.seen)
        self._has: dict[str, Moving] = {}  # known to be what the stamp says

    def lacks(self, states: Mapping[str, LayerState] | None) -> bool:
        """Compare with the owner's states; returns whether some have changed."""
        for layer, state in (states or {}).items():
            if (self._layers and layer not in self._layers) or self._has.get(layer) is state.moving:
                continue
            stamp = _stamp(state)
            if stamp == self._stamps.get(layer):
                self._has[layer] = state.moving
            else:
                self.changed.append((layer, state, stamp))
        return bool(self.changed)


def _stamp(state: LayerState) -> bytes:
    """Versions can go back, as ranks set earlier statistics: the version alone does not tell two states apart."""
    checksum = 0
    for vector in state.moving.values:
        checksum = crc32(vector.tobytes(), checksum)
    return state.version.to_bytes(8, "little") + checksum.to_bytes(4, "little")


def _job(seen: JobObservation) -> pb.Job:
    job = pb.Job(
        name=seen.job,
        phase=_PHASES[seen.phase],
        generation=seen.generation,
        world_size=seen.world_size,
        completed=seen.completed,
        layers=seen.layers,
        version=seen.version,
        ranks=map(_rank, seen.ranks[:_MOST_RANKS]),
        more_ranks=max(len(seen.ranks) - _MOST_RANKS, 0),
    )
    if seen.call is not None:
        job.operation, job.direction = operation_of(seen.call), direction_of(seen.call)
        job.step = seen.call.key.step
        if seen.call.key.layer is not None:
            job.layer = seen.call.key.layer
    return job


def _rank(seen: RankObservation) -> pb.JobRank:
    return pb.JobRank(
        rank=seen.peer.rank,
        host=seen.peer.host,
        pid=seen.peer.pid,
        connected=seen.is_connected,
        waited_s=seen.waited,
        held_up_s=seen.held_up,
        waiting_s=seen.waiting,
        awaited_s=seen.awaited,
        silent_s=seen.silent,
        straggler=seen.is_straggler,
    )


async def _refuse(context: _ReadContext, reason: wire.ErrorReason.ValueType, text: str) -> None:
    """End a call; never returns."""
    await abort(context, status_of(wire.Failure(reason=reason, text=text)))
