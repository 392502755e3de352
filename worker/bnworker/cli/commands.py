"""All commands of `bnlayer`."""

from __future__ import annotations

from typing import Annotated

import typer

from bnworker.cli.calibrate import calibrate
from bnworker.cli.certs import certs
from bnworker.cli.doctor import doctor
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
