"""`bnlayer serve`: the statistics service as a daemon.

Its options are the service's own settings: what can be said, and how it is read, stands in `bnserver.configuration`.
"""

from __future__ import annotations

import inspect
import os
from typing import Annotated, Any

import typer

from bnserver.configuration import SETTINGS


def _run(**given: Any) -> None:
    from bnserver.__main__ import run

    config, show = given.pop("config"), given.pop("print_config")
    flags = {name: None if value is None else str(value) for name, value in given.items()}
    raise typer.Exit(run(flags, os.environ, config, show=show))


def serve(**given: Any) -> None:
    """Run the statistics service until SIGTERM.

    On one host: `bnlayer serve --listen 127.0.0.1:50051 --state-dir /var/lib/bnlayer`

    Then, for each job: `bnlayer launch -n 4 --address 127.0.0.1:50051 --job mine -- python my_training.py`

    For other hosts, with certificates (`bnlayer certs init`) and tokens (`bnlayer tokens add`):
    `bnlayer serve --listen 0.0.0.0:50051 --state-dir state --tls-cert server.pem --tls-key server-key.pem
    --tokens tokens.toml`

    Each option is a variable (BNSERVER_STATE_DIR for --state-dir) and a key of the file (state-dir), too. It prints
    `bnserver listening on HOST:PORT` when it is ready. SIGTERM and SIGINT drain it: exit code 0 within 5 s. SIGHUP
    reads certificates and tokens anew.
    """
    _run(**given)


def _options() -> list[inspect.Parameter]:
    """The settings, as typer reads the parameters of a function."""
    parameters: list[tuple[str, Any, Any]] = []
    for setting in SETTINGS:
        shown = str(setting.default) if setting.default not in (None, False) else False
        option = typer.Option(
            f"{setting.flag}/--no-{setting.key}" if setting.is_switch else setting.flag,
            metavar=setting.metavar or None,
            help=f"{setting.help[0].upper()}{setting.help[1:]}.",
            show_default=shown,
        )
        parameters.append((setting.name, Annotated[bool | None if setting.is_switch else str | None, option], None))
    config = typer.Option("--config", metavar="FILE", help="Settings in TOML, e.g. state-dir = 'state'.")
    show = typer.Option("--print-config", help="Print each setting and where it was set, and do nothing else.")
    parameters += [("config", Annotated[str | None, config], None), ("print_config", Annotated[bool, show], False)]
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation, default in parameters
    ]


_PARAMETERS = _options()
serve.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]  # a function takes any attribute
serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _PARAMETERS}
