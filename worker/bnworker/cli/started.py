"""A rank of `bnlayer train`, as its launcher starts it: `python -m bnworker.cli.started --data=digits --epochs=20 …`

The launcher was given a command line, and has checked it. What it passes on are values, so a rank needs no parser of
command lines: without one it starts in two thirds of the time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from bnworker.cli.errors import CommandError, explained
from bnworker.cli.files import Files
from bnworker.train.declaration import from_options
from bnworker.train.settings import Settings


def main() -> None:
    """Train as the rank that the environment announces, and exit."""
    with explained():
        try:
            options = _options(sys.argv[1:])
            _train(str(options["--data"]), from_options(Settings, options), from_options(Files, options))
        except KeyboardInterrupt:  # too early to be asked to end: nothing was begun
            sys.exit(130)


def _options(arguments: Sequence[str]) -> Mapping[str, str | bool]:
    """What was passed on; `--name` alone is True."""
    parts = (argument.partition("=") for argument in arguments)
    return {name: value if equals else True for name, equals, value in parts}


def _train(data: str, settings: Settings, files: Files) -> None:
    one_thread()
    from bnlayer.environment import announced, variable
    from bnworker.cli.checks import refuse_what_cannot_work
    from bnworker.cli.rank import run
    from bnworker.train.loop import Replica

    alone = variable(os.environ, "BNLAYER_TRANSPORT") == "alone"
    replica = Replica()
    if alone:
        try:
            rank = next(iter(announced(os.environ)))
        except (StopIteration, ValueError) as error:
            raise CommandError(f"train: no launcher announced which rank this process is: {error}") from None
        replica = Replica(rank.rank, rank.world_size)
    refuse_what_cannot_work(data, settings, files, replicas=replica.count, launching=False)
    run(data, settings, transport="alone" if alone else None, address=None, job=None, replica=replica, files=files)


def one_thread() -> None:
    """Before NumPy is imported, see to it that a rank computes with one thread, unless the user says otherwise.

    A rank's share of a batch is small: threads for it cost more than they bring, and those of several ranks fight for
    the cores.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"


if __name__ == "__main__":
    main()
