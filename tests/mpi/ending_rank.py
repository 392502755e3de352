"""One rank of a job that ends badly: it joins as a user does, and writes the error that it gets.

mpiexec -n N python ending_rank.py WAY FOLDER
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import bnworker
from bnlayer.environment import announced
from bnworker import CollectiveError

TIMEOUT_S = 6.0  # ranks of a busy machine come out of the same barrier a second apart
JOINING_S = 100.0  # on a busy machine the last rank has imported seconds after the first
LATE_S = 3.6  # so late that this rank's own half of the timeout is not over when another's whole is


def main(way: str, folder: Path) -> None:
    """A barrier, and a reduction in which the last rank does not take part as it should."""
    if way == "never-joins" and announced(os.environ)[0].rank > 0:
        time.sleep(60)
        return
    world = bnworker.join(timeout=2.0 if way == "never-joins" else JOINING_S)
    (folder / f"{world.rank}.pid").write_text(str(os.getpid()), encoding="utf-8")
    world.allreduce([1.0])  # the first one sets up what later ones use, which takes its time
    world.barrier()
    world._transport._timeout = TIMEOUT_S  # type: ignore[attr-defined]  # of the MPI transport
    if world.rank == world.world_size - 1:
        (folder / "odd").write_text(str(time.monotonic()), encoding="utf-8")
        WAYS[way](world)
        return
    if way == "is-interrupted":
        time.sleep(60)
    if way == "is-slow" and world.rank == 1:
        time.sleep(LATE_S)
    began = time.monotonic()
    try:
        world.allreduce([1.0])
    except CollectiveError as error:
        answer = [type(error).__name__, str(error), error.ranks, began, time.monotonic()]
        (folder / f"{world.rank}.json").write_text(json.dumps(answer), encoding="utf-8")
        raise


def freeze(world: bnworker.World) -> None:
    """Stop, as under a debugger or on a machine that swaps."""
    del world
    os.kill(os.getpid(), signal.SIGSTOP)


def freeze_midway(world: bnworker.World) -> None:
    """Stop after all have agreed, when the data should move."""
    world._transport._reduced = lambda *_: freeze(world)  # type: ignore[attr-defined]  # of the MPI transport
    world.allreduce([1.0])


def fail(world: bnworker.World) -> None:
    """An exception that nobody catches, outside any `with` block."""
    del world
    raise ValueError("no such file")


def exit_3(world: bnworker.World) -> None:
    """A failing exit inside a `with` block."""
    with world:
        sys.exit(3)


def interrupt(world: bnworker.World) -> None:
    """Ctrl-C in the middle of an exchange: once this rank waits in it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    notes = world._transport._notes  # type: ignore[attr-defined]  # of the MPI transport
    notes.look_around = lambda *_: os.kill(os.getpid(), signal.SIGINT)
    world.allreduce([1.0])


def sleep(world: bnworker.World) -> None:
    """Compute for longer than the others wait."""
    del world
    time.sleep(60)


WAYS = {
    "freezes": freeze,
    "freezes-midway": freeze_midway,
    "fails": fail,
    "exits-3": exit_3,
    "returns": lambda world: None,
    "crashes": lambda world: os.kill(os.getpid(), signal.SIGKILL),
    "is-slow": sleep,
    "is-interrupted": interrupt,
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
