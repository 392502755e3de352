"""`grpc.health.v1`, bounded: it needs no token, and a `Watch` stays open for as long as its client likes."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health, health_pb2

from bnproto.failures import status_of
from bnproto.v1 import statistics_pb2 as pb
from bnserver.grpc_channel import abort

_WATCHERS = 256  # at a time
_NAME_CHARACTERS = 200  # of a service; each watcher's is kept


class Health(health.aio.HealthServicer):
    """The health of the service and of its saves."""

    def __init__(self) -> None:
        super().__init__()
        self._watchers = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """The status of a service, again whenever it changes."""
        text = ""
        if len(request.service) > _NAME_CHARACTERS:
            text = f"Expected the name of a service of up to {_NAME_CHARACTERS} characters."
        elif self._watchers >= _WATCHERS:
            text = f"{_WATCHERS} clients watch the health of this service already. Use Check, or try again later."
        if text:
            await abort(context, status_of(pb.Failure(reason=pb.ERROR_REASON_QUOTA, text=text)))
        self._watchers += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watchers -= 1
