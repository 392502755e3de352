"""Reloading: on SIGHUP, and when their files change, certificates and tokens are read anew.

What can't be used is reported, and what was in use stays in use: a slip of the pen must not stop a running service.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from bnproto.private_files import PrivateFileError, read_private
from bnserver.admission import Admission
from bnserver.authorization import Grants, TokensError, parse
from bnserver.tls import CertificateError, Certificates, Files, load

_LOOK_EVERY_S = 5.0  # at the files; Kubernetes needs a minute to bring a changed secret to them

_log = logging.getLogger("bnserver")

# What tells one content of a file from the next, without reading it.
_Stamp = tuple[int, int, int] | None


def read_tokens(path: Path) -> Grants:
    """Read the file of tokens.

    Raises:
        TokensError: it can't be read, is open to others, or is no such file.
    """
    try:
        return parse(read_private(path).decode("utf-8"))
    except PrivateFileError as error:
        raise TokensError(f"--tokens: {error}") from error
    except (UnicodeDecodeError, TokensError) as error:
        raise TokensError(f"--tokens {path}: {error}.") from None


class Reloading:
    """What can be read anew.

    Args:
        tls: the files of the certificates, and what uses them; None: plain text.
        tokens: the file, and what uses it; None: there is none.
    """

    def __init__(self, tls: tuple[Files, Certificates] | None, tokens: tuple[Path, Admission] | None) -> None:
        self._tls = tls
        self._tokens = tokens
        self._seen = self._stamps()

    def reload(self) -> None:
        """Read everything anew; says what has changed. Called for SIGHUP."""
        self._seen = self._stamps()
        if self._tls is None and self._tokens is None:
            _log.info("SIGHUP: there are neither certificates nor tokens to read anew")
        if self._tls is not None:
            self._attempt(self._reload_certificates, *self._tls)
        if self._tokens is not None:
            self._attempt(self._reload_tokens, *self._tokens)

    async def watch(self) -> None:
        """Read everything anew whenever a file has changed; until it is cancelled."""
        if self._tls is None and self._tokens is None:
            return
        changing = False
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            changing = self.look(changing=changing)

    def look(self, *, changing: bool) -> bool:
        """Look at the files once; read them when they have changed, and then stayed the same until the next look.

        Args:
            changing: what the look before returned.

        Returns:
            Whether they have changed since the look before: somebody may be writing.
        """
        stamps = self._stamps()
        if stamps != self._seen:
            self._seen = stamps
            return True
        if changing:
            self.reload()
        return False

    def _attempt(self, reload: Callable[..., None], *arguments: object) -> None:
        try:
            reload(*arguments)
        except (CertificateError, TokensError) as error:
            _log.error("%s What was read before stays in use.", error)

    def _reload_certificates(self, files: Files, certificates: Certificates) -> None:
        loaded = load(files)
        if loaded.contents == certificates.loaded.contents:
            _log.info("certificates: unchanged, %s", loaded)
            return
        _log.info("certificates: now %s; before %s", loaded, certificates.loaded)
        certificates.replace(loaded)

    def _reload_tokens(self, path: Path, admission: Admission) -> None:
        grants = read_tokens(path)
        before, after = set(admission.grants.grants), set(grants.grants)
        ended = admission.replace(grants)
        if before == after:
            _log.info("tokens: unchanged, %d of them", len(after))
            return
        names = [
            f"{what} {', '.join(sorted({repr(grant.name) for grant in some}))}"
            for what, some in (("new or changed:", after - before), ("gone or as they were:", before - after))
            if some
        ]
        _log.info("tokens: %d of them; %s; %d streams ended", len(after), "; ".join(names), ended)

    def _stamps(self) -> tuple[_Stamp, ...]:
        paths = [] if self._tls is None else [self._tls[0].certificate, self._tls[0].key, self._tls[0].client_ca]
        paths += [] if self._tokens is None else [self._tokens[0]]
        return tuple(_stamp(path) for path in paths if path is not None)


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
