"""`bnlayer serve`: the statistics service as a daemon."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class LogLevel(StrEnum):
    """What the service says on stderr."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def serve(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0: any free one.")
    ] = "127.0.0.1:50051",
    state_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the moving statistics are kept; without it, in memory alone."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without encryption: for trusted networks.")
    ] = False,
    ready_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Gets the address once the service listens.")
    ] = None,
    lease: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="A rank silent for so long is taken for frozen; 0: never.")
    ] = 5.0,
    away: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long a rank whose connection broke may stay away.")
    ] = 0.5,
    log_level: Annotated[LogLevel, typer.Option(help="What is said on stderr.")] = LogLevel.info,
) -> None:
    """Run the statistics service until SIGTERM.

    On one host: `bnlayer serve --listen 127.0.0.1:50051 --state-dir /var/lib/bnlayer`

    Then, for each job: `bnlayer launch -n 4 --address 127.0.0.1:50051 --job mine -- python my_training.py`

    It prints `bnserver listening on HOST:PORT` when it is ready. SIGTERM and SIGINT drain it: exit code 0 within 5 s.
    """
    from bnserver.core.members import LivenessTimeouts
    from bnserver.daemon import serve as run

    timeouts = LivenessTimeouts(lease, away)
    code = run(
        listen, state_dir, insecure=insecure, ready_file=ready_file, timeouts=timeouts, log_level=log_level.value
    )
    raise typer.Exit(code)
