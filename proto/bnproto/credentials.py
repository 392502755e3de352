"""Credentials: what a process shows to a statistics service, and how it knows that it is the right one.

Laws:
1. A token never crosses a network in plain text, unless the user says that the network is their own.
2. No error, log or `repr` holds a token.
3. Nothing is read here but the mapping: the files are read by `connection`, at each connection anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bnlayer.environment import variable
from bnproto.address import is_loopback, split

# RFC 6750's b68token: what may stand in a header as it is.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{1,512}=*")

# Every variable that says something of credentials.
VARIABLES = (
    "BNLAYER_TOKEN",
    "BNLAYER_TOKEN_FILE",
    "BNLAYER_TLS_CA",
    "BNLAYER_TLS_CERT",
    "BNLAYER_TLS_KEY",
    "BNLAYER_INSECURE",
)


class CredentialsError(ValueError):
    """Credentials are incomplete, contradict each other, or can't be used here; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What is used towards a service.

    Attributes:
        token: is shown to the service; None: `token_file`, or none.
        token_file: holds it; None: `token`, or none.
        ca: certificates of the authorities that the service's must be signed by; None: plain text.
        certificate, key: this process's own, where the service asks for one; both or neither.
        insecure: whether a token may cross a network in plain text.
    """

    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False

    @property
    def has_token(self) -> bool:
        """Whether there is a token, given or in a file."""
        return self.token is not None or self.token_file is not None

    def check(self, address: str) -> None:
        """Make sure that they may be used towards an address.

        Raises:
            CredentialsError: a token would cross a network in plain text.
        """
        parts = split(address)
        local = parts is not None and is_loopback(parts[0])
        if self.has_token and self.ca is None and not self.insecure and not local:
            raise CredentialsError(
                f"The token would cross the network to {address} in plain text. Set BNLAYER_TLS_CA to the certificate "
                "of the service's CA; or, if the network is your own and the service runs with --insecure, "
                "BNLAYER_INSECURE=1."
            )


NONE = Credentials()


def credentials(environ: Mapping[str, str], token: str | None = None) -> Credentials:
    """The credentials that an environment and the arguments of `join` name.

    Args:
        environ: the variables; an empty one is unset.
        token: an argument, which beats the variables; an empty one is none.

    Raises:
        CredentialsError: they are incomplete, contradict each other, or are malformed.
    """
    given, file = variable(environ, "BNLAYER_TOKEN"), variable(environ, "BNLAYER_TOKEN_FILE")
    if given is not None and file is not None and not token:
        raise CredentialsError("BNLAYER_TOKEN and BNLAYER_TOKEN_FILE are both set: unset one of them.")
    ca, certificate, key = (variable(environ, f"BNLAYER_TLS_{name}") for name in ("CA", "CERT", "KEY"))
    if (certificate is None) != (key is None):
        there, missing = ("CERT", "KEY") if key is None else ("KEY", "CERT")
        raise CredentialsError(f"BNLAYER_TLS_{there} is set, but BNLAYER_TLS_{missing} is not: set both, or neither.")
    if certificate is not None and ca is None:
        raise CredentialsError(
            "BNLAYER_TLS_CERT is set, but BNLAYER_TLS_CA is not: set it to the certificate of the CA that signed the "
            "service's. Without it nothing is encrypted, and nobody is shown a certificate."
        )
    insecure = variable(environ, "BNLAYER_INSECURE") or "0"
    if insecure not in ("0", "1"):
        raise CredentialsError(f"BNLAYER_INSECURE: expected 0 or 1, received {insecure!r}.")
    if token:
        given, file = valid_token(token, "token="), None
    elif given is not None:
        given = valid_token(given, "BNLAYER_TOKEN")
    return Credentials(
        given,
        None if file is None else Path(file),
        None if ca is None else Path(ca),
        None if certificate is None else Path(certificate),
        None if key is None else Path(key),
        insecure == "1",
    )


def valid_token(text: str, source: str) -> str:
    """A token, as it is.

    Args:
        text: the token.
        source: what holds it, for the error.

    Raises:
        CredentialsError: it can't be one. Its text is not shown.
    """
    if _TOKEN.fullmatch(text) is None:
        raise CredentialsError(
            f"{source}: expected a token of 1 to 512 letters, digits and ._~+/-, received {len(text)} characters that "
            "are not one. Remove spaces, quotes and line ends."
        )
    return text
