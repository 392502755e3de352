"""What the page's port answers. Everything is a GET; what a browser loads is for everybody, data for those who may.

With tokens, data needs one of the role `reader` or above, and shows its jobs. Without, the port is on loopback, or the
operator said `--insecure`; there the `Host` of a request must be one by which this machine is reached: a web page from
elsewhere can make a browser ask a local port under a name of its own, and would read the answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bnproto.address import is_loopback, split
from bnserver.admission import Admission
from bnserver.authorization import PAGE, Blame, Refusal, authenticate
from bnserver.core.observation import JobObservation
from bnserver.core.waiting import BOUNDS
from bnserver.counts import Failure
from bnserver.page.history import History, described

_EVERY_S = 1.0
_WAKE_S = 0.1
_STATIC = Path(__file__).parent / "static"
_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)

Covers = Callable[[str], bool]


class Look(NamedTuple):
    """What the service looks like.

    Attributes:
        jobs: those that are not over.
        failures: the latest runs that ended with an error, the last one first.
    """

    jobs: Sequence[JobObservation]
    failures: Sequence[Failure]


class Sampler:
    """Looks at the service every second, and tells the viewers.

    Args:
        look: looks at the service.
        now: seconds since 1970.
    """

    def __init__(self, look: Callable[[], Awaitable[Look]], now: Callable[[], float]) -> None:
        self.history = History()
        self._seen = Look([], [])
        self._look = look
        self._now = now
        self._time = 0.0
        self._looks = 0
        self._is_closed = False

    async def run(self) -> None:
        """Go on until it is cancelled."""
        while True:
            await self.sample()
            await asyncio.sleep(_EVERY_S)

    async def sample(self) -> None:
        """Look once."""
        self._seen = await self._look()
        self._time = self._now()
        self.history.add(self._seen.jobs, self._time)
        self._looks += 1

    def close(self) -> None:
        """The service stops: viewers are let go. Called by any thread."""
        self._is_closed = True

    async def next(self, seen: int) -> int:
        """Wait for a look after the one of this number; returns its number, 0 when there will be none."""
        while self._looks == seen and not self._is_closed:  # noqa: ASYNC110 - another thread closes it
            await asyncio.sleep(_WAKE_S)
        return 0 if self._is_closed else self._looks

    def seen(self, covers: Covers) -> dict[str, Any]:
        """What a viewer sees."""
        jobs = [
            {**described(job), "layers": self.history.layers(job.job)} for job in self._seen.jobs if covers(job.job)
        ]
        alarms = [alarm for alarm in self.history.alarms if covers(alarm["job"])]
        failures = [failure._asdict() for failure in self._seen.failures if covers(failure.job)]
        return {"time": self._time, "bounds": BOUNDS, "jobs": jobs, "alarms": alarms, "failures": failures}


def application(sampler: Sampler, admission: Admission | None, host: str) -> Starlette:
    """The page's application.

    Args:
        sampler: looks at the service.
        admission: lets calls in; None: everybody may.
        host: on which it listens.
    """

    async def events(request: Request) -> Response:
        refusal = _covers(request, admission)
        if isinstance(refusal, Response):
            return refusal

        async def stream() -> AsyncIterator[str]:
            look = 0
            while look := await sampler.next(look):
                covers = _covers(request, admission)  # the token may have been withdrawn
                if isinstance(covers, Response):
                    return
                yield f"data: {json.dumps(sampler.seen(covers))}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def series(request: Request) -> Response:
        covers = _covers(request, admission)
        if isinstance(covers, Response):
            return covers
        job, layer = request.query_params.get("job", ""), request.query_params.get("layer", "")
        series = sampler.history.series(job, layer) if covers(job) else None
        return JSONResponse(series) if series is not None else JSONResponse({"error": "There is no such layer."}, 404)

    hosts = (
        None if admission is not None or not is_loopback(host) else frozenset({host, "localhost", "127.0.0.1", "::1"})
    )
    return Starlette(
        routes=[
            Route("/events", events),
            Route("/series", series),
            Mount("/", StaticFiles(directory=_STATIC, html=True)),
        ],
        middleware=[Middleware(_Guard, hosts=hosts)],
    )


def _covers(request: Request, admission: Admission | None) -> Covers | Response:
    """Which jobs a request may see; or its refusal."""
    if admission is None:
        return _all
    outcome = authenticate(admission.grants, PAGE, request.headers.get("authorization"))
    if isinstance(outcome, Refusal):
        admission.refused[outcome.blame.value] += 1
        status = 401 if outcome.blame is Blame.UNAUTHENTICATED else 403
        return JSONResponse({"error": outcome.text}, status)
    assert outcome is not None
    return outcome.covers


class _Guard:
    """Refuses names that are not this machine's, and tells browsers to load nothing from elsewhere."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Called for each request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        if self._hosts is not None and _host(scope) not in self._hosts:
            text = "Expected the name of this machine in the address, such as localhost.\n"
            await Response(text, 421, media_type="text/plain")(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)


def _host(scope: Scope) -> str:
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    parts = split(host) or split(f"{host}:0")
    return parts[0] if parts is not None else ""


def _all(job: str) -> bool:
    """Without tokens."""
    del job
    return True
