"""The daemon's certificates: read, tried out, and replaced without an interruption.

Before they are used, they are tried out: a client that trusts the certificate makes a handshake with a server that has
it, in memory. So a key of another certificate, an expired one, or one that is not for servers is found here, and not by
the ranks. gRPC asks for the certificates of each new connection; connections that are open keep theirs.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc

from bnproto.private_files import PrivateFileError, read_private, read_public
from bnproto.tls import Tried, attempt, load_authorities, reason


class CertificateError(ValueError):
    """A certificate can't be used; the text says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Files:
    """Where the certificates are.

    Attributes:
        certificate: the service's, and those between it and its CA.
        key: its key.
        client_ca: the CAs of which a rank's certificate must be; None: ranks need none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """Certificates that were read, and can be used.

    Attributes:
        configuration: gRPC's.
        contents: of the files, to see whether they have changed.
        tried: what is known of the certificate.
    """

    configuration: grpc.ServerCertificateConfiguration
    contents: tuple[bytes, ...]
    tried: Tried

    def __str__(self) -> str:
        return f"for {', '.join(self.tried.names) or 'no name'}, valid until {self.tried.expires:%Y-%m-%d %H:%M} UTC"

    def days_left(self) -> int:
        """Whole days until it ends."""
        return (self.tried.expires - datetime.now(UTC)).days

    def __repr__(self) -> str:
        return f"Loaded({self})"  # `contents` holds the key


def load(files: Files) -> Loaded:
    """Read certificates, and try them out.

    Raises:
        CertificateError: they can't be used.
    """
    contents = _contents(files)
    tried = _tried(files)
    if _contents(files) != contents:
        raise CertificateError(f"{files.certificate} or its key changed while they were read. Send SIGHUP once more.")
    certificate, key, *client_ca = contents
    configuration = grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca[0] if client_ca else None)
    return Loaded(configuration, contents, tried)


class Certificates:
    """What new connections are answered with.

    Args:
        loaded: the first ones.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._next: grpc.ServerCertificateConfiguration | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """For a port of the server."""
        ranks_have_some = len(self.loaded.contents) > 2
        return grpc.dynamic_ssl_server_credentials(
            self.loaded.configuration,
            self._fetch,  # type: ignore[arg-type]  # its types do not know that None means: the same
            require_client_authentication=ranks_have_some,
        )

    def replace(self, loaded: Loaded) -> None:
        """Answer new connections with others."""
        self.loaded, self._next = loaded, loaded.configuration

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC, in a thread of its own, for each connection; None: the same as before."""
        following, self._next = self._next, None
        return following


def _contents(files: Files) -> tuple[bytes, ...]:
    try:
        pair = read_public(files.certificate), read_private(files.key)
        return pair if files.client_ca is None else (*pair, read_public(files.client_ca))
    except PrivateFileError as error:
        raise CertificateError(str(error)) from error


def _tried(files: Files) -> Tried:
    """What is known of the certificate, once a handshake has succeeded with it."""
    try:
        if files.client_ca is not None:
            load_authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), files.client_ca)
        return attempt(files.certificate, files.key, of_server=True)
    except ssl.SSLError as error:
        raise CertificateError(
            f"The certificate in {files.certificate} can't be used: {reason(error)}. Make another one, e.g. bnlayer "
            "certs init --renew."
        ) from error
    except ValueError as error:
        raise CertificateError(f"The service's certificates: {error}.") from error
