"""`bnlayer tokens`: the file of tokens that a service reads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bnworker.cli.errors import CommandError

tokens = typer.Typer(no_args_is_help=True, help="Tokens for a service: who may do what in which job.")


class RoleName(StrEnum):
    """What a token allows in its jobs."""

    reader = "reader"
    worker = "worker"
    admin = "admin"


@tokens.command("add")
def add(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Of the service's --tokens; is made if there is none.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="Whose token it is, for the log and for errors.")],
    job: Annotated[
        list[str], typer.Option(metavar="PATTERN", help="A job that it is for, e.g. 'team-a-*'; may be repeated.")
    ],
    role: Annotated[RoleName, typer.Option(help="A reader looks, a worker is a rank, an admin may do all.")] = (
        RoleName.worker
    ),
) -> None:
    """Draw a token, list it in a file, and print it: once, for the file keeps its digest alone.

    `bnlayer tokens add tokens.toml --name team-a --job 'team-a-*' > team-a.token`

    Ranks find it by BNLAYER_TOKEN_FILE=team-a.token (chmod 600). A running service reads the file within some seconds,
    or at once after SIGHUP. To withdraw a token, delete its entry: its streams are ended.
    """
    import os
    import secrets

    from bnproto.private_files import PrivateFileError, read_private
    from bnserver.authorization import TokensError, entry, parse, role_of

    token = secrets.token_urlsafe(32)
    try:
        # Made before it is written to, so that nobody else can read it in between.
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600))
        before = read_private(file).decode("utf-8")
        added = entry(name, token, job, role_of(role.value))
        after = f"{before}\n{added}" if before.strip() else added
        parse(after)  # a name that is there already, a broken file
        from bnlayer.files import write_atomically

        write_atomically(file, after.encode())
    except (OSError, PrivateFileError, TokensError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"tokens add: {file}: {why}") from None
    typer.echo(token)
