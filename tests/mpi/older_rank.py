"""One rank under an MPI that knows no persistent collectives: sums, a disagreement, and a clean end.

mpiexec -n 2 python older_rank.py
"""

import sys

import numpy as np
from mpi4py import MPI

from bnlayer.errors import CollectiveError
from bnworker import World
from bnworker.transports.mpi import MPITransport


class Older(MPI.Intracomm):
    """A communicator of MPI 3."""

    def Allreduce_init(self, *arguments: object) -> MPI.Prequest:
        """What mpi4py does where the MPI it was built with has no such function."""
        raise NotImplementedError("MPI_Allreduce_init", *arguments)


def main() -> None:
    """Say what came of it."""
    for disagree in (False, True):
        world = World(MPITransport(Older(MPI.COMM_WORLD)), install=False)
        sums = []
        try:
            sums = [world.allreduce([np.full(3, world.rank + step)])[0].tolist() for step in range(3)]
            world.allreduce([np.zeros(1 + world.rank * disagree)])
            world.leave()
            reported = f"{sums}"
        except CollectiveError as error:
            reported = f"{sums}, {type(error).__name__}"
        sys.stdout.write(f"{world.rank}: {reported}\n")


if __name__ == "__main__":
    main()
