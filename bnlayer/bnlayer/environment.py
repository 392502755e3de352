"""Which launcher started this process, and which rank it gave it: a pure reading of environment variables.

MPI's and torchrun's variables beat Slurm's, which a batch script's children inherit too. Inside `salloc` or a
batch script a plain process has SLURM variables but is no step of a job: only a step announces ranks. What looks like
a step and is none is for `batch_script` to say.

A variable that is set and empty counts as not set: `variable` reads it so, for every variable of the project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Steps that srun does not number: the shell of salloc, a batch script, what sshd started for a user. <slurm/slurm.h>
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True, slots=True)
class Announcement:
    """A rank that some launcher announced.

    Attributes:
        source: the launcher, as text.
        rank: this process's rank, from 0.
        world_size: the number of ranks.
        variable: the variable that holds the rank.
        mpi: whether the launcher sets up MPI.
        job: what the launcher calls the job, unique to this run of it; None: nothing that is.
    """

    source: str
    rank: int
    world_size: int
    variable: str
    mpi: bool = False
    job: str | None = None


@dataclass(frozen=True, slots=True)
class _Launcher:
    """How a launcher announces ranks.

    Attributes:
        source: its name, as text.
        rank: the variable of the rank.
        sizes: those of the number of ranks, of which the first that is set counts.
        mpi: whether it sets up MPI.
        started: whether it started this process, where its variables alone don't say.
        job: what it calls the job.
    """

    source: str
    rank: str
    sizes: tuple[str, ...]
    mpi: bool = False
    started: Callable[[Mapping[str, str]], bool] = lambda _: True
    job: Callable[[Mapping[str, str]], str | None] = lambda _: None


def variable(environ: Mapping[str, str], name: str) -> str | None:
    """The value of a variable; None where it is not set, or empty."""
    return environ.get(name) or None


def _is_batch(environ: Mapping[str, str]) -> bool:
    """Whether this is a batch script that was submitted from within a step, whose variables it has.

    Slurm replaces those of the job and of the task, and leaves SLURM_STEP_*. Every task of srun's has SLURM_UMASK,
    which Slurm takes from the environment of a batch script.
    """
    return (
        variable(environ, "ENVIRONMENT") == "BATCH"
        and variable(environ, "SLURM_UMASK") is None
        and variable(environ, "SLURM_GTIDS") == "0"
        and variable(environ, "SLURM_PROCID") == "0"
    )


def _is_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script has no step's number of its own, and is always process 0."""
    step, rank = variable(environ, "SLURM_STEP_ID"), variable(environ, "SLURM_PROCID")
    if _is_batch(environ):
        return False
    if step is None:
        return rank not in (None, "0")
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def _step(environ: Mapping[str, str]) -> str | None:
    job, step = variable(environ, "SLURM_JOB_ID"), variable(environ, "SLURM_STEP_ID")
    return f"{job}.{step}" if job is not None and step is not None else None


def _has_stale_pmi(environ: Mapping[str, str]) -> bool:
    """Whether PMI's variables are those of a `srun --mpi=pmi2` in which this job, or step, was started by a program."""
    job, step = variable(environ, "PMI_JOBID"), _step(environ)
    if job is None or step is None or variable(environ, "MPI_LOCALNRANKS") is not None:  # mpiexec's
        return False
    return job != step or _is_batch(environ)


def _step_job(environ: Mapping[str, str]) -> str | None:
    """A step's, not its allocation's: another step there is another run."""
    step = _step(environ)
    return None if step is None else f"slurm-{step}"


def _torchrun_job(environ: Mapping[str, str]) -> str | None:
    """The run's id; without `--rdzv-id`, it is "none" for every run."""
    run = variable(environ, "TORCHELASTIC_RUN_ID")
    return None if run in (None, "none") else f"torchrun-{run}"


def _pod_job(environ: Mapping[str, str]) -> str | None:
    """The Job's name: the pods of an indexed one have the hostnames JOB-INDEX."""
    host, index = variable(environ, "HOSTNAME") or "", variable(environ, "JOB_COMPLETION_INDEX")
    return host.removesuffix(f"-{index}") if index is not None and host.endswith(f"-{index}") else None


_SLURM_SIZES = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")

# Earlier beats later; of those with the same variable, the first that started this process is the one.
_LAUNCHERS = (
    _Launcher("bnlayer launch (BNLAYER_*)", "BNLAYER_RANK", ("BNLAYER_WORLD_SIZE",)),
    _Launcher("Open MPI's mpiexec", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), mpi=True),
    _Launcher(
        "Intel MPI's mpiexec",
        "PMI_RANK",
        ("PMI_SIZE",),
        mpi=True,
        started=lambda environ: variable(environ, "I_MPI_HYDRA_UUID") is not None,
    ),
    _Launcher(
        "Slurm's srun --mpi=pmi2",
        "PMI_RANK",
        ("PMI_SIZE",),
        mpi=True,
        started=lambda environ: (
            _step(environ) is not None
            and variable(environ, "PMI_JOBID") == _step(environ)
            and not _has_stale_pmi(environ)
        ),
        job=_step_job,
    ),
    _Launcher(
        "MPICH's mpiexec",
        "PMI_RANK",
        ("PMI_SIZE",),
        mpi=True,
        started=lambda environ: not _has_stale_pmi(environ),
    ),
    _Launcher(
        "Slurm's srun --mpi=pmix",
        "PMIX_RANK",
        _SLURM_SIZES,
        mpi=True,
        started=lambda environ: (variable(environ, "PMIX_NAMESPACE") or "").startswith("slurm.pmix."),
        job=_step_job,
    ),
    _Launcher("torchrun", "RANK", ("WORLD_SIZE",), job=_torchrun_job),
    _Launcher("Kubernetes' indexed Job", "JOB_COMPLETION_INDEX", ("BNLAYER_WORLD_SIZE",), job=_pod_job),
    _Launcher("Slurm's srun", "SLURM_PROCID", _SLURM_SIZES, started=_is_step, job=_step_job),
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
    announcements: dict[str, Announcement] = {}
    for launcher in _LAUNCHERS:
        size_variable = next((name for name in launcher.sizes if variable(environ, name)), launcher.sizes[0])
        rank, size = variable(environ, launcher.rank), variable(environ, size_variable)
        if rank is None or size is None or launcher.rank in announcements or not launcher.started(environ):
            continue
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise ValueError(
                f"{launcher.source}: expected 0 <= {launcher.rank} < {size_variable}, received {rank!r} and {size!r}."
            )
        announcements[launcher.rank] = Announcement(
            launcher.source, int(rank), int(size), launcher.rank, launcher.mpi, launcher.job(environ)
        )
    return list(announcements.values())


def prte(environ: Mapping[str, str]) -> str | None:
    """Which PMIx launcher started this process without saying how many ranks there are, as text: MPI knows."""
    rank, size = variable(environ, "PMIX_RANK"), variable(environ, "OMPI_COMM_WORLD_SIZE")
    if rank is None or size is not None or (variable(environ, "PMIX_NAMESPACE") or "").startswith("slurm.pmix."):
        return None
    return f"prterun or another PMIx launcher (PMIX_RANK={rank})"


def batch_script(environ: Mapping[str, str]) -> str | None:
    """Why a process with Slurm's variables of several tasks is none of them; None where nothing looks like it."""
    rank, tasks = variable(environ, "SLURM_PROCID"), variable(environ, "SLURM_NTASKS")
    job = variable(environ, "SLURM_JOB_ID")
    if tasks in (None, "1") or _is_step(environ) or (rank is None and job is None):
        return None
    which = f"SLURM_PROCID={rank}" if rank is not None else f"SLURM_JOB_ID={job}"
    what = "a batch script or a child of one" if rank is not None else "one of an allocation (salloc)"
    step = "is that of the step in which it was submitted" if _is_batch(environ) and _step(environ) else "is not"
    return (
        f"{which} and SLURM_NTASKS={tasks} are set, but SLURM_STEP_ID {step}: this process is {what}, not a rank, and "
        "trains alone. Start the ranks with srun, or with bnlayer launch."
    )
