"""Which launcher started this process, and which rank it gave it: a pure reading of environment variables.

MPI's and torchrun's variables beat Slurm's, which a batch script's children inherit too. Inside `salloc` or a
batch script a plain process has SLURM variables but is no step of a job: only a step announces ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Announcement:
    """A rank that some launcher announced.

    Attributes:
        source: the launcher, in words.
        rank: this process's rank, from 0.
        world_size: the number of ranks.
        variable: the variable that holds the rank.
    """

    source: str
    rank: int
    world_size: int
    variable: str


# launcher, rank variable, size variable; earlier beats later.
_LAUNCHERS = (
    ("bnlayer launch (BNLAYER_*)", "BNLAYER_RANK", "BNLAYER_WORLD_SIZE"),
    ("Open MPI's mpiexec", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPICH's mpiexec", "PMI_RANK", "PMI_SIZE"),
    ("torchrun", "RANK", "WORLD_SIZE"),
    ("Slurm's srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def announced(environ: Mapping[str, str]) -> list[Announcement]:
    """Every launcher that announces a rank in an environment, strongest first.

    Args:
        environ: the variables, e.g. `os.environ`.

    Returns:
        One entry per launcher whose rank and size variables are both set.

    Raises:
        ValueError: a variable is set to something that is no number, or a rank lies outside its world.
    """
    found = []
    for source, rank_variable, size_variable in _LAUNCHERS:
        rank, size = environ.get(rank_variable), environ.get(size_variable)
        if rank is None or size is None:
            continue
        if source.startswith("Slurm") and not environ.get("SLURM_STEP_ID", "").isdecimal():
            continue
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise ValueError(
                f"{source}: expected 0 <= {rank_variable} < {size_variable}, received {rank!r} and {size!r}."
            )
        found.append(Announcement(source, int(rank), int(size), rank_variable))
    return found
