"""The HTTP port of `--metrics`: the standard library's server, with bounds, and prometheus_client's answer.

It runs in threads of its own, so that nobody who connects here holds up a rank: at most 8 connections at a time, each
with 5 s to say what it wants, and one scrape after the other, with pauses in which the ranks have the processor.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from bnproto.address import split
from bnserver.authorization import METRICS, Blame, Refusal, authenticate
from bnserver.metrics import Source
from bnserver.tls import Files, Loaded

_CONNECTIONS = 8
_SILENT_S = 5.0
_PAUSE = 4.0  # times what the last scrape took: so all scrapes together take a fifth of a core

_log = logging.getLogger("bnserver")


class Endpoint:
    """The port.

    Args:
        address: HOST:PORT; port 0 takes a free one.
        source: of the metrics.
        files: of the certificates, where `source` has some.

    Raises:
        OSError: it can't listen there.
    """

    def __init__(self, address: str, source: Source, files: Files | None) -> None:
        parts = split(address)
        assert parts is not None
        self._source = source
        self._files = files
        self._context: tuple[Loaded, ssl.SSLContext] | None = None
        self._one_scrape = threading.Lock()
        self._not_before = 0.0
        self._server = _server(*parts, self._encrypted if source.certificates is not None else None)
        self._server.set_app(self._answer)
        self._thread = threading.Thread(target=self._server.serve_forever, name="bnserver-metrics", daemon=True)
        self._thread.start()
        host = address.rpartition(":")[0]
        scheme = "http" if source.certificates is None else "https"
        _log.info("metrics: %s://%s:%d%s", scheme, host, self._server.server_port, METRICS)

    def close(self) -> None:
        """Listen no more. Takes up to half a second."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        if request.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            return _response(respond, "405 Method Not Allowed", "Expected GET.")
        if request.get("PATH_INFO") != METRICS:
            return _response(respond, "404 Not Found", f"The metrics are at {METRICS}.")
        covers, admission = _all, self._source.admission
        if admission is not None:
            outcome = authenticate(admission.grants, METRICS, request.get("HTTP_AUTHORIZATION"))
            if isinstance(outcome, Refusal):
                admission.refused[outcome.blame.value] += 1
                unknown = outcome.blame is Blame.UNAUTHENTICATED
                return _response(respond, "401 Unauthorized" if unknown else "403 Forbidden", outcome.text)
            assert outcome is not None
            covers = outcome.covers
        registry = CollectorRegistry()
        try:
            return self._scraped(registry, covers, request, respond)
        except TimeoutError:
            return _response(respond, "503 Service Unavailable", "The service is too busy to look at itself.")

    def _scraped(
        self,
        registry: CollectorRegistry,
        covers: Callable[[str], bool],
        request: WSGIEnvironment,
        respond: StartResponse,
    ) -> Iterable[bytes]:
        with self._one_scrape:
            time.sleep(max(self._not_before - time.monotonic(), 0.0))  # however many scrape, a core is theirs in part
            began = time.monotonic()
            try:
                registry.register(self._source.collector(covers))
                answer: Iterable[bytes] = make_wsgi_app(registry)(request, respond)
            finally:
                took = time.monotonic() - began
                self._not_before = began + (1 + _PAUSE) * took
        return answer

    def _encrypted(self, plain: socket.socket) -> socket.socket:
        """A connection over TLS; the handshake is made by the thread that reads from it."""
        assert self._source.certificates is not None
        assert self._files is not None
        loaded = self._source.certificates.loaded
        if self._context is None or self._context[0] is not loaded:
            # What can't be read now is being replaced: what was read before is good for a while.
            with suppress(OSError, ssl.SSLError):
                context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                context.load_cert_chain(self._files.certificate, self._files.key)
                if self._files.client_ca is not None:
                    context.load_verify_locations(self._files.client_ca)
                    context.verify_mode = ssl.CERT_REQUIRED
                self._context = loaded, context
        if self._context is None:
            raise OSError("no certificate can be read")
        return self._context[1].wrap_socket(plain, server_side=True, do_handshake_on_connect=False)


def _all(job: str) -> bool:
    """Without tokens."""
    del job
    return True


def _response(respond: StartResponse, status: str, text: str) -> list[bytes]:
    """An answer in plain text."""
    headers = [("Content-Type", "text/plain; charset=utf-8")]
    if status.startswith("401"):
        headers.append(("WWW-Authenticate", "Bearer"))
    respond(status, headers)
    return [f"{text}\n".encode()]


class _Handler(WSGIRequestHandler):
    timeout = _SILENT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Scrapes are not worth a line."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = _CONNECTIONS
    encrypted: Callable[[socket.socket], socket.socket] | None = None

    def __init__(self, *args: Any) -> None:
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__(*args)

    def server_bind(self) -> None:
        """Bind, without asking for this host's name: that may take seconds."""
        socket_address: Any = self.server_address
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(socket_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        plain, peer = self.socket.accept()
        plain.settimeout(_SILENT_S)
        try:
            return (plain if self.encrypted is None else self.encrypted(plain)), peer
        except OSError:
            plain.close()
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give it a thread, if there is one left."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve it, and give the thread back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up, or makes no handshake, is not worth a line either; a fault of ours is."""
        del request, client_address
        _log.debug("a connection to the metrics ended early", exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


def _server(host: str, port: int, encrypted: Callable[[socket.socket], socket.socket] | None) -> _Server:
    server = (_Server6 if ":" in host else _Server)((host, port), _Handler)
    server.encrypted = encrypted
    return server
