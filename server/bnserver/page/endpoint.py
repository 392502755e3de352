"""The port of `--dashboard`: uvicorn in a thread of its own, so that no viewer holds up a rank."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette

from bnproto.address import split
from bnserver.admission import Admission
from bnserver.page.application import Look, Sampler, application
from bnserver.page.bounded_http import BoundedHttp
from bnserver.servicer import Servicer
from bnserver.tls import Certificates, Files, Loaded

_VIEWERS = 64
_BACKLOG = 64
_GRACE_S = 1  # for viewers' connections, when the service stops

_log = logging.getLogger("bnserver")


class Dashboard:
    """The port.

    Args:
        address: HOST:PORT; port 0 takes a free one.
        exchanges: serves the ranks.
        loop: in which it does so.
        admission: lets calls in; None: everybody may.
        certificates: of the service; None: plain text.
        files: of the certificates, where there are some.

    Raises:
        OSError: it can't listen there.
    """

    def __init__(
        self,
        address: str,
        exchanges: Servicer,
        loop: asyncio.AbstractEventLoop,
        admission: Admission | None,
        certificates: Certificates | None,
        files: Files | None,
    ) -> None:
        parts = split(address)
        assert parts is not None
        self._exchanges = exchanges
        self._loop = loop
        self._certificates = certificates
        self._files = files
        self._loaded: Loaded | None = certificates.loaded if certificates is not None else None
        family = socket.AF_INET6 if ":" in parts[0] else socket.AF_INET
        self._socket = socket.create_server(parts, family=family, backlog=_BACKLOG)
        self._sampler = Sampler(self._look, time.time)
        self._server = uvicorn.Server(self._configuration(self._running(admission, parts[0])))
        self._thread = threading.Thread(target=self._run, name="bnserver-dashboard", daemon=True)
        self._thread.start()
        scheme = "http" if certificates is None else "https"
        port = self._socket.getsockname()[1]
        _log.info("dashboard: %s://%s:%d/", scheme, address.rpartition(":")[0], port)

    def close(self) -> None:
        """Stop listening, and close all connections."""
        self._sampler.close()
        self._server.should_exit = True
        self._thread.join(2 * _GRACE_S)
        self._socket.close()

    def _configuration(self, app: Starlette) -> uvicorn.Config:
        encrypted: dict[str, Any] = {}
        if self._files is not None:
            encrypted = {"ssl_certfile": self._files.certificate, "ssl_keyfile": self._files.key}
            if self._files.client_ca is not None:
                encrypted |= {"ssl_ca_certs": str(self._files.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        return uvicorn.Config(
            app,
            log_config=None,
            log_level=logging.ERROR,
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            http=BoundedHttp,
            loop="asyncio",
            limit_concurrency=_VIEWERS,
            timeout_graceful_shutdown=_GRACE_S,
            **encrypted,
        )

    def _running(self, admission: Admission | None, host: str) -> Starlette:
        app = application(self._sampler, admission, host)

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            sampling = asyncio.create_task(self._sample())
            yield
            sampling.cancel()

        app.router.lifespan_context = lifespan
        return app

    async def _sample(self) -> None:
        while True:
            try:
                await self._sampler.run()
            except Exception:  # noqa: BLE001 - the page must neither end the service nor itself
                _log.exception("a fault of the dashboard")
                await asyncio.sleep(1)

    async def _look(self) -> Look:
        self._renew()

        async def look() -> Look:
            jobs = list(self._exchanges.jobs.observe(self._exchanges.jobs.active))
            return Look(jobs, list(self._exchanges.counts.failures))

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(look(), self._loop))

    def _renew(self) -> None:
        """Use certificates that the service has read anew, for the connections that come."""
        if self._certificates is None or self._certificates.loaded is self._loaded or self._files is None:
            return
        context = self._server.config.ssl
        assert context is not None
        with contextlib.suppress(OSError, ssl.SSLError):  # they are being replaced
            context.load_cert_chain(self._files.certificate, self._files.key)
            self._loaded = self._certificates.loaded

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])
