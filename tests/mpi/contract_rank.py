"""One rank of the contract under mpiexec: runs every body in a world of its own, and writes what it saw.

mpiexec -n N python contract_rank.py FOLDER
"""

import json
import os
import sys
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path

from mpi4py import MPI

from bnworker import World
from bnworker.transports import mpi, peers
from support.contract import BODIES, names
from support.contract.timing import watch

SMALL_CHUNK = 100_000  # elements: every larger array takes several collectives


def main(folder: Path) -> None:
    """Run the bodies; a failing one is told to the other ranks, so that they go on to the next."""
    warnings.simplefilter("error")
    peers.CHUNK = SMALL_CHUNK
    seen: dict[str, dict[str, object]] = {}
    rank, world_size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    for name in names("mpi", world_size):
        deterministic = name == "float_sums_have_the_order_of_the_ranks"
        transport = mpi.MPITransport(timeout=60, deterministic=deterministic)
        watched = watch(transport)
        world = World(transport, install=False)
        try:
            seen[name] = {"saw": BODIES[name].run(world)}
        except BaseException as error:  # noqa: BLE001 - the outcome of a body, whatever it is
            seen[name] = {"failed": traceback.format_exc()}
            world._depart(f"failed with {type(error).__name__}")
        else:
            world.leave()
        seen[name] |= asdict(watched)
        (folder / f"{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    sys.stdout.write(f"{rank} of {world_size} done, pid {os.getpid()}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
