"""Admission: asks `authorization` at the place where a call enters, before a request reaches the servicer.

A stream is admitted with its first request, the join, which names the job. When the tokens are read anew, the streams
of those that are not there any more, or not for that job, are ended. What a rank sends on its local socket needs no
check of its own: its ticket came on the stream, is good for that stream alone, and ends with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from bnproto.failures import status_of
from bnproto.grpc_options import OBSERVATION_NAME
from bnproto.v1 import statistics_pb2 as pb
from bnserver.authorization import Blame, Grant, Grants, Refusal, authenticate, authorize, need_of
from bnserver.grpc_channel import abort
from bnserver.unjoined import JOIN_WITHIN_S, MOST

_REASONS = {
    Blame.UNAUTHENTICATED: pb.ERROR_REASON_UNAUTHENTICATED,
    Blame.PERMISSION: pb.ERROR_REASON_PERMISSION,
}
_OF_SEVERAL_JOBS = frozenset({f"/{OBSERVATION_NAME}/ListJobs"})
_LOG_EVERY_S = 1.0  # whoever tries tokens shall not fill the disk with what is said about it

_log = logging.getLogger("bnserver")

# The token of the call in progress; None: the service asks for none. A call that names no job is about the token's.
grant_of_call: ContextVar[Grant | None] = ContextVar("grant_of_call", default=None)

# A method's implementation. Any: its types are those of its messages.
_Method = Callable[[Any, Any], Awaitable[Any]]


@dataclass(slots=True, eq=False)
class _Seat:
    """A stream that was admitted.

    Attributes:
        grant: its token.
        job: the job that it joined.
        task: serves it.
        refusal: why it is ended; None: it is not.
    """

    grant: Grant
    job: str
    task: asyncio.Task[Any]
    refusal: Refusal | None = None


class Admission(grpc.aio.ServerInterceptor):
    """Lets calls through that show a token which allows them.

    Args:
        grants: all tokens.

    Attributes:
        grants: those that are in force.
        refused: how many calls were, by why.
    """

    def __init__(self, grants: Grants) -> None:
        self.grants = grants
        self.refused: Counter[str] = Counter()
        self._seats: set[_Seat] = set()
        self._waiting: Counter[bytes] = Counter()  # streams whose first message has not come, by token
        self._unsaid = 0
        self._logged = float("-inf")

    def replace(self, grants: Grants) -> int:
        """Take other tokens, and end the streams that they do not allow; returns how many those are."""
        self.grants = grants
        kept = {grant.digest: grant for grant in grants.grants}
        ended = 0
        for seat in tuple(self._seats):
            grant = kept.get(seat.grant.digest)
            if grant is not None and grant.covers(seat.job) and grant.role >= seat.grant.role:
                continue
            seat.refusal = Refusal(
                Blame.PERMISSION,
                f"The token {seat.grant.name!r} was withdrawn, or is not for this job any more. Ask whoever runs the "
                "service for another one, and start the job again.",
                seat.grant.name,
            )
            seat.task.cancel()
            ended += 1
        return ended

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called by gRPC for each call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        shown = [value for key, value in handler_call_details.invocation_metadata or () if key == "authorization"]
        outcome = authenticate(self.grants, method, str(shown[0]) if len(shown) == 1 else None)
        if isinstance(outcome, Refusal):
            return _with(handler, self._refusing(outcome))
        if outcome is None:
            return handler
        if not need_of(method).of_job:
            return (
                _with(handler, self._granting(outcome, _method_of(handler))) if method in _OF_SEVERAL_JOBS else handler
            )
        admitting = self._admitting_stream if handler.request_streaming else self._admitting_call
        return _with(handler, admitting(outcome, _method_of(handler)))

    def _refusing(self, refusal: Refusal) -> _Method:
        async def refuse(_: Any, context: Any) -> None:
            await self._refuse(context, refusal)

        return refuse

    def _granting(self, grant: Grant, proceed: _Method) -> _Method:
        async def call(request: Any, context: Any) -> Any:
            grant_of_call.set(grant)
            return await proceed(request, context)

        return call

    def _admitting_call(self, grant: Grant, proceed: _Method) -> _Method:
        async def call(request: Any, context: Any) -> Any:
            refusal = authorize(grant, request.job)
            if refusal is not None:
                await self._refuse(context, refusal)
            return await proceed(request, context)

        return call

    def _admitting_stream(self, grant: Grant, proceed: _Method) -> _Method:
        async def stream(requests: AsyncIterator[pb.ExchangeRequest], context: Any) -> None:
            if self._waiting[grant.digest] >= MOST:
                text = f"{MOST} streams with the token {grant.name!r} are open that have not joined. Try again."
                await abort(context, status_of(pb.Failure(reason=pb.ERROR_REASON_QUOTA, text=text)))
            self._waiting[grant.digest] += 1
            coming, first = aiter(requests), None
            try:
                async with asyncio.timeout(JOIN_WITHIN_S):
                    first = await anext(coming, None)
            except TimeoutError:
                first = None
            except DecodeError as error:
                await abort(context, status_of(pb.Failure(reason=pb.ERROR_REASON_INVALID, text=f"{error}.")))
            finally:
                self._waiting[grant.digest] -= 1
            if first is None:
                return
            # Whoever begins with anything else is refused by the servicer, for that.
            refusal = authorize(grant, first.join.job) if first.HasField("join") else None
            if refusal is not None:
                await self._refuse(context, refusal)
            task = asyncio.current_task()
            assert task is not None
            seat = _Seat(grant, first.join.job, task)
            self._seats.add(seat)
            try:
                await proceed(_all(first, coming), context)
            except asyncio.CancelledError:
                if seat.refusal is None:  # gRPC did it: the rank is gone
                    raise
                task.uncancel()
                await self._refuse(context, seat.refusal)
            finally:
                self._seats.discard(seat)

        return stream

    async def _refuse(self, context: Any, refusal: Refusal) -> None:
        """End a call; never returns."""
        self.refused[refusal.blame.value] += 1
        self._log_refusal(f"refused {context.peer()}: {refusal.text}")
        await abort(context, status_of(pb.Failure(reason=_REASONS[refusal.blame], text=refusal.text)))

    def _log_refusal(self, text: str) -> None:
        now = time.monotonic()
        if now < self._logged + _LOG_EVERY_S:
            self._unsaid += 1
            return
        unsaid, self._unsaid, self._logged = self._unsaid, 0, now
        _log.warning("%s%s", text, f" ({unsaid} more refusals were not logged)" if unsaid else "")


async def _all(
    first: pb.ExchangeRequest, coming: AsyncIterator[pb.ExchangeRequest]
) -> AsyncIterator[pb.ExchangeRequest]:
    yield first
    async for request in coming:
        yield request


def _method_of(handler: Any) -> _Method:
    methods = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    method: _Method = next(method for method in methods if method is not None)
    return method


def _with(handler: Any, method: _Method) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same shape, with another implementation."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    made: grpc.RpcMethodHandler[Any, Any] = make(method, handler.request_deserializer, handler.response_serializer)
    return made
