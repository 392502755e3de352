"""Which launcher started this process, and which rank it gave it: a pure reading of environment variables.

MPI's and torchrun's variables beat Slurm's, which a batch script's children inherit too. Inside `salloc` or a
batch script a plain process has SLURM variables but is no step of a job: only a step announces ranks. What looks like
a step and is none is for `batch_script` to say.

A variable that is set and empty counts as not set: `variable` reads it so, for every variable of the project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Announcement:
    """A rank that some launcher announced.

    Attributes:
        source: the launcher, as text.
        rank: this process's rank, from 0.
        world_size: the number of ranks.
        variable: the variable that holds the rank.
    """

    source: str
    rank: int
    world_size: int
    variable: str


# launcher, rank variable, size variables, of which the first that is set counts; earlier beats later.
_LAUNCHERS = (
    ("bnlayer launch (BNLAYER_*)", "BNLAYER_RANK", ("BNLAYER_WORLD_SIZE",)),
    ("Open MPI's mpiexec", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    ("MPICH's mpiexec", "PMI_RANK", ("PMI_SIZE",)),
    ("torchrun", "RANK", ("WORLD_SIZE",)),
    ("Slurm's srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
)


def variable(environ: Mapping[str, str], name: str) -> str | None:
    """The value of a variable; None where it is not set, or empty."""
    return environ.get(name) or None


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
    for source, rank_variable, size_variables in _LAUNCHERS:
        size_variable = next((name for name in size_variables if variable(environ, name)), size_variables[0])
        rank, size = variable(environ, rank_variable), variable(environ, size_variable)
        if rank is None or size is None:
            continue
        if rank_variable == "SLURM_PROCID" and not _is_step(environ):
            continue
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise ValueError(
                f"{source}: expected 0 <= {rank_variable} < {size_variable}, received {rank!r} and {size!r}."
            )
        found.append(Announcement(source, int(rank), int(size), rank_variable))
    return found


def batch_script(environ: Mapping[str, str]) -> str | None:
    """Why a process with Slurm's variables of several tasks is none of them; None where nothing looks like it."""
    rank, tasks = variable(environ, "SLURM_PROCID"), variable(environ, "SLURM_NTASKS")
    if rank is None or tasks in (None, "1") or _is_step(environ):
        return None
    return (
        f"SLURM_PROCID={rank} and SLURM_NTASKS={tasks} are set, but SLURM_STEP_ID is not: this process is a batch "
        "script or a child of one, not a rank, and trains alone. Start the ranks with srun, or with bnlayer launch."
    )


def _is_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script has no step's number, and is always process 0."""
    step, rank = variable(environ, "SLURM_STEP_ID"), variable(environ, "SLURM_PROCID")
    return rank != "0" if step is None else step.isdecimal()
