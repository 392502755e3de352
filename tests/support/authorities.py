"""Certificates for tests: a service's, and those of ranks, below authorities of a test's own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from bnproto.credentials import Credentials


class Authority:
    """A CA, in a folder of its own.

    Args:
        folder: is made, and gets the files.

    Attributes:
        ca: the file of its certificate.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(self._authority.cert_pem.bytes())

    def issue(self, name: str, *hosts: str, expired: bool = False) -> tuple[Path, Path]:
        """A certificate and its key, in files of this name; again under the same name: others in their place."""
        end = datetime.now(UTC) - timedelta(days=1) if expired else None
        begin = datetime.now(UTC) - timedelta(days=9) if expired else None
        issued = self._authority.issue_cert(*(hosts or ("127.0.0.1", "localhost")), not_before=begin, not_after=end)
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}-key.pem"
        certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        key.touch(0o600)
        key.write_bytes(issued.private_key_pem.bytes())
        return certificate, key

    def flags(self, name: str = "server", *hosts: str) -> list[str]:
        """A daemon's flags, with a new certificate."""
        certificate, key = self.issue(name, *hosts)
        return ["--tls-cert", str(certificate), "--tls-key", str(key)]

    def credentials(self, client: tuple[Path, Path] | None = None, token: str | None = None) -> Credentials:
        """Those of a rank that trusts this CA."""
        certificate, key = client or (None, None)
        return Credentials(token, ca=self.ca, certificate=certificate, key=key)
