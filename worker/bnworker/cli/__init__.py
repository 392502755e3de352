"""The command line: `bnlayer train`, `evaluate`, `export`, `calibrate`, `launch`, `serve`, and what operators need.

`commands` puts them together. `jobs` shows what a service is doing; `state`, `certs` and `tokens` are groups of
commands of their own; `doctor` says what is installed. `started` is a rank of `bnlayer train`, as its launcher starts
it.

Exit codes: 0 it worked; 1 training, or the service, failed; 2 it was asked for something wrong; of `launch` and
`train` otherwise that of the first rank that failed, 128 + signal where a signal ended it.

Laws of this package:
1. `--help` imports neither NumPy nor gRPC: a command imports what it needs when it runs.
2. What the user did wrong is one line on stderr, and exit code 2. What we did wrong is a traceback.
3. Nothing else imports this package.
"""

from bnworker.cli.errors import explained


def main() -> None:
    """Run the command line, and exit."""
    from bnworker.cli.commands import app  # here: a rank that a launcher starts needs none of it

    with explained():
        app(prog_name="bnlayer")  # also where it runs as a module: completion and usage speak of the command
