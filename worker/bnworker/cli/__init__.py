"""The command line: `bnlayer train`, `evaluate`, `export`, `calibrate`, `launch`, `serve`, and what operators need.

`jobs` shows what a service is doing; `state`, `certs` and `tokens` are groups of commands of their own; `doctor` says
what is installed.

Exit codes: 0 it worked; 1 training, or the service, failed; 2 it was asked for something wrong; of `launch` and
`train` otherwise that of the first rank that failed, 128 + signal where a signal ended it.

Laws of this package:
1. `--help` imports neither NumPy nor gRPC: a command imports what it needs when it runs.
2. What the user did wrong is one line on stderr, and exit code 2. What we did wrong is a traceback.
3. Nothing else imports this package.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bnworker.cli.calibrate import calibrate
from bnworker.cli.certs import certs
from bnworker.cli.doctor import doctor
from bnworker.cli.errors import CommandError
from bnworker.cli.evaluate import evaluate
from bnworker.cli.export import export
from bnworker.cli.jobs import jobs
from bnworker.cli.launch import launch
from bnworker.cli.serve import serve
from bnworker.cli.state import state
from bnworker.cli.tokens import tokens
from bnworker.cli.train import train

app = typer.Typer(
    name="bnlayer",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # a traceback of ours goes into a report as it is
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"bnlayer {version('bnlayer')}")
        raise typer.Exit


@app.callback()
def bnlayer(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Batch normalization whose statistics are exact across any set of processes.

    Train the built-in job with two processes: `bnlayer train --data digits --workers 2`

    Run your own program on four: `bnlayer launch -n 4 -- python my_training.py`
    """
    del version


app.command()(train)
app.command()(evaluate)
app.command()(export)
app.command()(calibrate)
app.command(context_settings={"allow_interspersed_args": False})(launch)
app.command()(serve)
app.add_typer(state, name="state")
app.command()(jobs)
app.add_typer(certs, name="certs")
app.add_typer(tokens, name="tokens")
app.command()(doctor)


def main() -> None:
    """Run the command line, and exit."""
    try:
        app(prog_name="bnlayer")  # also where it runs as a module: completion and usage speak of the command
    except CommandError as error:
        sys.stdout.flush()
        typer.echo(f"bnlayer: {error}", err=True)
        sys.exit(error.code)
