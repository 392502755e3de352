"""Connections to a statistics service, in plain text or over TLS, with a token or without.

The files that the credentials name are read for each connection anew, so a process that runs for weeks uses the
certificates and tokens that were renewed meanwhile. gRPC says little of why a connection over TLS fails, and says it in
words that change: so `fault` makes the handshake once more, with the standard library, whose errors have numbers.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Self

import grpc

from bnproto.address import split
from bnproto.credentials import NONE, Credentials, CredentialsError, valid_token
from bnproto.grpc_options import CLIENT_OPTIONS, Options
from bnproto.private_files import PrivateFileError, read_private, read_public
from bnproto.tls import EXPIRED, NOT_YET_VALID, WRONG_NAME, attempt, load_authorities, load_pair, reason

_FAULT_S = 2.0  # how long a handshake may take


class Connector:
    """Makes connections to one service.

    Args:
        address: of the service, HOST:PORT.
        credentials: what is used towards it.

    Raises:
        CredentialsError: a file can't be read or is none of its kind, or a token would cross a network in plain text.
    """

    def __init__(self, address: str, credentials: Credentials = NONE) -> None:
        credentials.check(address)
        self.address = address
        self._credentials = credentials
        self._secrets = _read(credentials)

    def channel(self, options: Options = CLIENT_OPTIONS) -> grpc.Channel:
        """A channel; its connection is made with the first call."""
        with suppress(CredentialsError):  # in the middle of a renewal: what was read before may still be good
            self._secrets = _read(self._credentials)
        secrets = self._secrets
        if secrets.ca is None:
            channel = grpc.insecure_channel(self.address, options)
        else:
            trust = grpc.ssl_channel_credentials(secrets.ca, secrets.key, secrets.certificate)
            channel = grpc.secure_channel(self.address, trust, options)
        return channel if secrets.token is None else _TokenChannel(channel, secrets.token)

    def fault(self) -> str | None:
        """Why no connection can be made, where TLS is why: what is wrong, and what to do. None otherwise."""
        parts = split(self.address)
        if parts is None:
            return None
        try:
            context = _context(self._credentials)
        except CredentialsError as error:
            return str(error)
        try:
            # A service that stops closes connections, too; then nobody listens the second time.
            if self._is_welcome(context, parts) or self._is_welcome(context, parts):
                return None
        except ssl.SSLCertVerificationError as error:
            return self._distrusted(error, parts[0])
        except ssl.SSLError as error:
            if self._credentials.ca is not None and "WRONG_VERSION" in (error.reason or ""):
                return self._speaks_no_tls()
            return self._speaks_tls() if self._credentials.ca is None and "ALERT" in (error.reason or "") else None
        except (OSError, ValueError):  # nobody listens, or takes too long: gRPC says so, too
            return None
        return self._speaks_tls() if self._credentials.ca is None else self._unwelcome()

    def _is_welcome(self, context: ssl.SSLContext, host_and_port: tuple[str, int]) -> bool:
        """Whether the service goes on after a handshake; False: it closes the connection, for it misses something."""
        with (
            socket.create_connection(host_and_port, timeout=_FAULT_S) as plain,
            context.wrap_socket(plain, server_hostname=host_and_port[0]) as encrypted,
        ):
            if self._credentials.ca is None:
                return False  # plain text is what it does not like
            try:
                return bool(encrypted.recv(1))
            except ConnectionResetError:
                return False

    def _distrusted(self, error: ssl.SSLCertVerificationError, host: str) -> str:
        """Why this process does not accept the service's certificate."""
        whose = f"The certificate of the service at {self.address}"
        if error.verify_code == EXPIRED:
            return f"{whose} has expired. Whoever runs the service renews it: bnlayer certs init --renew, then SIGHUP."
        if error.verify_code == NOT_YET_VALID:
            return f"{whose} is not valid yet. Compare this machine's clock with that of the one that made it."
        if error.verify_code in WRONG_NAME:
            return (
                f"{whose} is not for {host!r}. Reach it by a name that is in the certificate (BNLAYER_ADDRESS); or "
                f"whoever runs the service renews it with this one: bnlayer certs init --renew --host {host}"
            )
        return (
            f"{whose} is not signed by the CA in BNLAYER_TLS_CA ({self._credentials.ca}): {reason(error)}. "
            "Either it is another service, or this is another CA's certificate: ask whoever runs the service for it."
        )

    def _unwelcome(self) -> str:
        """Why the service closes the connection, where this process had nothing against the certificate."""
        certificate, key = self._credentials.certificate, self._credentials.key
        if certificate is None or key is None:
            return (
                f"The service at {self.address} asks for a client certificate, and this process has none: set "
                "BNLAYER_TLS_CERT and BNLAYER_TLS_KEY to one that is signed by its client CA."
            )
        refused = f"The service at {self.address} refuses the client certificate in BNLAYER_TLS_CERT ({certificate}):"
        try:
            attempt(certificate, key, of_server=False)
        except (ssl.SSLError, ValueError) as error:
            return f"{refused} {reason(error)}. Get another one from whoever runs the service."
        return (
            f"{refused} it is not signed by a CA of its --tls-client-ca. Get one that is from whoever runs the service."
        )

    def _speaks_tls(self) -> str:
        return (
            f"The service at {self.address} speaks TLS, and this process plain text: set BNLAYER_TLS_CA to the "
            "certificate of the service's CA."
        )

    def _speaks_no_tls(self) -> str:
        return (
            f"What listens at {self.address} speaks no TLS, which BNLAYER_TLS_CA asks for: start the service with "
            "--tls-cert and --tls-key, or unset BNLAYER_TLS_CA if the network is your own."
        )


class _Secrets(NamedTuple):
    token: str | None
    ca: bytes | None
    certificate: bytes | None
    key: bytes | None

    def __repr__(self) -> str:
        return "_Secrets(…)"


def _read(credentials: Credentials) -> _Secrets:
    """The contents of the files.

    Raises:
        CredentialsError: one can't be read, or is not what it is taken for.
    """
    token = credentials.token
    if credentials.token_file is not None:
        text = _content(read_private, credentials.token_file, "BNLAYER_TOKEN_FILE").decode("ascii", "replace")
        token = valid_token(text.strip(), f"BNLAYER_TOKEN_FILE={credentials.token_file}")
    if credentials.ca is None:
        return _Secrets(token, None, None, None)
    _context(credentials)
    ca = _content(read_public, credentials.ca, "BNLAYER_TLS_CA")
    if credentials.certificate is None or credentials.key is None:
        return _Secrets(token, ca, None, None)
    certificate = _content(read_public, credentials.certificate, "BNLAYER_TLS_CERT")
    return _Secrets(token, ca, certificate, _content(read_private, credentials.key, "BNLAYER_TLS_KEY"))


def _content(read: Callable[[Any], bytes], path: object, variable: str) -> bytes:
    try:
        return read(path)
    except PrivateFileError as error:
        raise CredentialsError(f"{variable}: {error}") from error


def _context(credentials: Credentials) -> ssl.SSLContext:
    """The standard library's terms of a connection; without a CA, any certificate is accepted.

    Raises:
        CredentialsError: a file is not what it is taken for.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if credentials.ca is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    try:
        load_authorities(context, credentials.ca)
    except ValueError as error:
        raise CredentialsError(f"BNLAYER_TLS_CA: {error}.") from error
    if credentials.certificate is not None and credentials.key is not None:
        try:
            load_pair(context, credentials.certificate, credentials.key)
        except ValueError as error:
            raise CredentialsError(f"BNLAYER_TLS_CERT and BNLAYER_TLS_KEY: {error}.") from error
    return context


class _TokenChannel(grpc.Channel):
    """A channel that shows a token with each call.

    gRPC's interceptors would do it in fewer lines, but they look a method up for each call; where another thread has
    closed the channel meanwhile, that is a segmentation fault (seen with grpcio 1.85). Here it is looked up once.
    """

    def __init__(self, channel: grpc.Channel, token: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),)

    def unary_unary(self, *method: Any, **options: Any) -> Any:
        """See `grpc.Channel`, as for the others."""
        return _Shown(self._channel.unary_unary(*method, **options), self._metadata)

    def unary_stream(self, *method: Any, **options: Any) -> Any:
        return _Shown(self._channel.unary_stream(*method, **options), self._metadata)

    def stream_unary(self, *method: Any, **options: Any) -> Any:
        return _Shown(self._channel.stream_unary(*method, **options), self._metadata)

    def stream_stream(self, *method: Any, **options: Any) -> Any:
        return _Shown(self._channel.stream_stream(*method, **options), self._metadata)

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Shown:
    """A method of the service, called with the token."""

    def __init__(self, call: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._call = call
        self._metadata = metadata

    def __call__(self, request: Any, **options: Any) -> Any:
        return self._call(request, metadata=self._metadata, **options)

    def future(self, request: Any, **options: Any) -> Any:
        return self._call.future(request, metadata=self._metadata, **options)
