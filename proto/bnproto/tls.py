"""TLS in the standard library: a certificate tried out in memory, and errors in words.

gRPC uses a TLS of its own, which says little of what it does not like. The standard library's says it with numbers.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

EXPIRED, NOT_YET_VALID = 10, 9  # OpenSSL's numbers, in `verify_code`
WRONG_NAME = (62, 64)  # host, address


@dataclass(frozen=True, slots=True)
class Tried:
    """A certificate with which a handshake succeeds.

    Attributes:
        names: that it is for.
        expires: when it ends.
    """

    names: tuple[str, ...]
    expires: datetime


def reason(error: Exception) -> str:
    """Why files can't be used, or a handshake failed: a few words, without OpenSSL's numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or "it can't be read as one").replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)


def load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Let a side show a certificate.

    Raises:
        ValueError: they are none, or do not go together; the text says so.
    """
    try:
        context.load_cert_chain(certificate, key, password="")  # else it would ask on the terminal
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a certificate in PEM in {certificate} and its key, without a password, in {key}: {reason(error)}"
        ) from error


def load_authorities(context: ssl.SSLContext, path: Path) -> None:
    """Let a side trust what CAs have signed.

    Raises:
        ValueError: the file holds no certificates; the text says so.
    """
    try:
        context.load_verify_locations(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected certificates in PEM in {path}: {reason(error)}") from error


def attempt(certificate: Path, key: Path, *, of_server: bool) -> Tried:
    """Make a handshake in memory, with a peer that trusts the certificate itself.

    Args:
        certificate, key: the files.
        of_server: whether it is the server's; else it is the client's, and the server's does not matter.

    Raises:
        ValueError: the files can't be used.
        ssl.SSLError: the peer does not accept the certificate.
    """
    server_side, client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.verify_mode = ssl.CERT_NONE
    load_pair(server_side, certificate, key)
    load_pair(client_side, certificate, key)
    verifier = client_side if of_server else server_side
    verifier.verify_mode = ssl.CERT_REQUIRED
    verifier.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is what is trusted
    load_authorities(verifier, certificate)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(to_client, to_server)
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    parsed: Any = (client if of_server else server).getpeercert()
    names = tuple(str(name) for _, name in parsed.get("subjectAltName", ()))
    return Tried(names, datetime.fromtimestamp(ssl.cert_time_to_seconds(parsed["notAfter"]), UTC))
