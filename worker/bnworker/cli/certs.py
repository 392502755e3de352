"""`bnlayer certs`: certificates for a service and its ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnworker.cli.errors import CommandError

certs = typer.Typer(no_args_is_help=True, help="Make certificates for a service and its ranks, and look at them.")

_NEEDS = "certs: needs the package cryptography: pip install 'bnlayer[tls]'."
_CLEAR_DAYS = 14  # an end that comes sooner needs doing something about


@certs.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets the files.")],
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name or address by which ranks reach the service; may be repeated."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the certificates are valid.")] = 365,
    renew: Annotated[
        bool, typer.Option("--renew", help="New certificates for service and ranks, from the CA in the folder.")
    ] = False,
) -> None:
    """Make a CA, a certificate for the service, and one for its ranks.

    `bnlayer certs init certificates --host trainer --host 10.0.0.7`

    The service: `bnlayer serve --listen 0.0.0.0:50051 --tls-cert certificates/server.pem
    --tls-key certificates/server-key.pem --tls-client-ca certificates/ca.pem`

    Each rank: BNLAYER_TLS_CA=ca.pem BNLAYER_TLS_CERT=client.pem BNLAYER_TLS_KEY=client-key.pem

    Keep ca-key.pem away from both: it makes more certificates. `localhost`, `127.0.0.1` and `::1` are always among the
    service's names. `--renew` keeps those that it has; send the service SIGHUP afterwards.
    """
    try:
        from bnserver.certificates import CertificateFilesError
        from bnserver.certificates import init as run
    except ImportError as error:
        raise CommandError(_NEEDS) from error
    if not host and not renew:
        raise CommandError("certs init: expected --host NAME, by which ranks reach the service; e.g. --host trainer.")
    try:
        written = run(folder, host or (), days, renew=renew)
    except CertificateFilesError as error:
        raise CommandError(f"certs init: {error}") from None
    for path in written:
        typer.echo(path)


@certs.command("check")
def check(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FOLDER]", help="Of `certs init`; without it, the files of the options.", show_default=False
        ),
    ] = None,
    cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="BNLAYER_TLS_CERT", help="A certificate, and those between it and its CA."),
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", envvar="BNLAYER_TLS_KEY", help="Its key.")] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", envvar="BNLAYER_TLS_CA", help="The CA that should have signed it.")
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name that the service's certificate should be for; may be repeated."),
    ] = None,
    days: Annotated[int, typer.Option(min=0, help="Complain about an end within so many days.")] = _CLEAR_DAYS,
) -> None:
    """Look at certificates: validity, names, who signed them, and whether their keys go with them.

    `bnlayer certs check certificates --host trainer`

    `bnlayer certs check --cert server.pem --key server-key.pem --ca ca.pem --days 30`

    Exit code 0: nothing to do. 1: something is wrong, or ends soon. 2: a file can't be read.
    """
    from datetime import UTC, datetime

    try:
        from bnserver.certificates import CertificateFilesError
        from bnserver.certificates import check as run
    except ImportError as error:
        raise CommandError(_NEEDS) from error
    listed: list[tuple[Path, Path | None, Path | None, list[str]]] = []
    if folder is not None:
        authority = folder / "ca.pem"
        listed.append((authority, None, authority, []))
        for name, hosts in (("server", host or []), ("client", [])):
            listed.append((folder / f"{name}.pem", folder / f"{name}-key.pem", authority, hosts))
    elif cert is not None:
        listed.append((cert, key, ca, host or []))
    else:
        raise CommandError("certs check: expected a FOLDER or --cert FILE.")
    good = True
    for certificate, its_key, its_ca, hosts in listed:
        try:
            what, wrong = run(certificate, its_key, its_ca, hosts, days, datetime.now(UTC))
        except CertificateFilesError as error:
            raise CommandError(f"certs check: {error}") from None
        typer.echo(f"{certificate}: {what}")
        for fault in wrong:
            typer.echo(f"{certificate}: {fault}")
        good = good and not wrong
    raise typer.Exit(0 if good else 1)
