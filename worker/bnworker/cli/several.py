"""What commands have in common that run as one process, or as several ranks: `calibrate`, `evaluate`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bnworker.cli.errors import EXPLAINED, CommandError
from bnworker.cli.ranks import RanksOfOnePass, TrainTransport

if TYPE_CHECKING:
    from bnworker.world import World


def ranks_to_launch(command: str, ranks: RanksOfOnePass) -> int:
    """How many ranks this process must start; 0: it is one of them, or the only one.

    Raises:
        CommandError: the options contradict each other, or the environment.
    """
    from bnlayer.environment import announced

    try:
        rank = next(iter(announced(os.environ)), None)
    except ValueError as error:
        raise CommandError(f"{command}: {error}") from None
    workers = ranks.workers
    if rank is not None:
        if workers not in (None, rank.world_size):
            raise CommandError(
                f"{command}: --workers {workers}, but {rank.source} started this process as one of {rank.world_size}."
            )
        return 0
    if workers in (None, 1):
        return 0
    if ranks.transport is TrainTransport.none:
        raise CommandError(
            f"{command}: --transport none is for one worker: what a part of the rows gives is of no use."
        )
    return workers or 0


def launch(
    command: str,
    checkpoint: Path,
    arguments: Sequence[str],
    workers: int,
    ranks: RanksOfOnePass,
) -> int:
    """Run a command again as each of several ranks, once it is clear that its checkpoint can be read.

    Raises:
        CommandError: it can't, or the ranks can't be started.
    """
    from bnworker.launcher import Job, LaunchError
    from bnworker.launcher import launch as launched
    from bnworker.train.checkpoint import CheckpointError, read

    try:
        if read(checkpoint) is None:
            raise CommandError(f"{command}: {checkpoint}: there is no such file.")
    except CheckpointError as error:
        raise CommandError(f"{command}: {error}") from None
    line = (sys.executable, "-P", "-m", "bnworker.cli", command, *arguments)
    try:
        return launched(
            Job(
                line,
                workers,
                ranks.transport.value,
                ranks.address,
                foreground=True,
                program=command,
                explained=EXPLAINED,
            )
        )
    except LaunchError as error:
        raise CommandError(f"{command}: {error}", error.code) from None


def joined(command: str) -> World:
    """The world of this rank; floats are added in rank order, so that figures do not depend on the transport.

    Raises:
        CommandError: joining failed.
    """
    from bnlayer import CollectiveError
    from bnworker.joining import join

    try:
        return join(deterministic=True)
    except CollectiveError as error:
        raise CommandError(f"{command}: {type(error).__name__}: {error}", 1) from None
    except (ValueError, ImportError, RuntimeError) as error:
        raise CommandError(f"{command}: {error}") from None
