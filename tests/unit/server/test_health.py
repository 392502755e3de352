"""Whoever watches the service's health is one of a few, and needs no token."""

import asyncio

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from bnserver.health import _WATCHERS, Health


class _Context:
    """The service's end of a call."""

    def __init__(self) -> None:
        self.received: list[str] = []

    async def write(self, response: health_pb2.HealthCheckResponse) -> None:
        self.received.append(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    async def abort(self, code: grpc.StatusCode, text: str, details: object) -> None:
        self.received.append(text)
        raise grpc.aio.AbortError


def test_watchers_are_few_and_give_their_place_back() -> None:
    """Without a bound, 2,000 of one process took 70 MB; each may stay for ever."""

    async def scene() -> None:
        health, request = Health(), health_pb2.HealthCheckRequest()
        contexts = [_Context() for _ in range(_WATCHERS)]
        watching = [asyncio.ensure_future(health.Watch(request, context)) for context in contexts]
        while not contexts[-1].received:  # noqa: ASYNC110 - what tells it is not ours
            await asyncio.sleep(0)
        late = _Context()
        with pytest.raises(grpc.aio.AbortError):
            await health.Watch(request, late)
        assert late.received == ["256 clients watch the health of this service already. Use Check, or try again later."]
        watching[0].cancel()
        await asyncio.wait(watching[:1])
        newcomer = _Context()
        watching[0] = asyncio.ensure_future(health.Watch(request, newcomer))
        while not newcomer.received:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0)
        assert newcomer.received == contexts[1].received == ["SERVING"]
        for task in watching:
            task.cancel()
        await asyncio.wait(watching)

    asyncio.run(scene())


def test_the_name_of_a_service_is_short() -> None:
    """It is kept for as long as its watcher stays, and a message has 4 MiB."""
    late = _Context()
    with pytest.raises(grpc.aio.AbortError):
        asyncio.run(Health().Watch(health_pb2.HealthCheckRequest(service="x" * 201), late))
    assert late.received == ["Expected the name of a service of up to 200 characters."]
