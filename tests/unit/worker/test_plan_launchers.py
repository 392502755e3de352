"""Which rank a process is where each launcher started it: in environments that launchers really set."""

from __future__ import annotations

from typing import Any

import pytest

from bnlayer import BatchNormalization
from bnworker.plan import plan, survives_losses
from support import environments as started

ADDRESS = {"BNLAYER_ADDRESS": "h:1"}
AT = "the service's address is h:1; "
# Without an address, then with one: transport, rank, number of ranks, the job's name, and what is logged of the choice.
# A text where nothing says how the ranks reach each other.
LAUNCHED: dict[str, tuple[dict[str, str], tuple[Any, ...] | str, tuple[Any, ...] | str]] = {
    "Open MPI": (
        started.OPEN_MPI,
        ("mpi", 1, 2, None, "Open MPI's mpiexec started this process; OMPI_COMM_WORLD_RANK says the rank"),
        "missing the job's name (job= or BNLAYER_JOB).",
    ),
    "MPICH": (
        started.MPICH,
        ("mpi", 1, 2, None, "MPICH's mpiexec started this process; PMI_RANK says the rank"),
        "missing the job's name (job= or BNLAYER_JOB).",
    ),
    "Intel MPI": (
        started.INTEL_MPI,
        ("mpi", 1, 2, None, "Intel MPI's mpiexec started this process; PMI_RANK says the rank"),
        "missing the job's name (job= or BNLAYER_JOB).",
    ),
    "prterun": (
        started.PRTERUN,
        (
            *("mpi", None, None, None),
            "prterun or another PMIx launcher (PMIX_RANK=1) started this process; no launcher announces a rank",
        ),
        "missing the job's name (job= or BNLAYER_JOB), this process's rank (rank= or BNLAYER_RANK), the number",
    ),
    "torchrun": (
        started.TORCHRUN,
        (
            *("service", 1, 2, "torchrun-8b1fae09-f274-4f96-a288-65e6a38e35be"),
            (
                "torchrun announces 2 ranks; RANK says the rank; torchrun names the job "
                "torchrun-8b1fae09-f274-4f96-a288-65e6a38e35be; rank 0 starts the service at 127.0.0.1:0"
            ),
        ),
        (
            *("service", 1, 2, "torchrun-8b1fae09-f274-4f96-a288-65e6a38e35be"),
            f"{AT}RANK says the rank; torchrun names the job torchrun-8b1fae09-f274-4f96-a288-65e6a38e35be",
        ),
    ),
    "torchrun without an id": (
        started.TORCHRUN_STATIC,
        (
            *("service", 1, 2, "job"),
            "torchrun announces 2 ranks; RANK says the rank; rank 0 starts the service at 127.0.0.1:0",
        ),
        "missing the job's name (job= or BNLAYER_JOB).",
    ),
    "salloc": (
        started.SALLOC,
        ("alone", 0, 1, None, "nothing announces other ranks"),
        "missing the job's name (job= or BNLAYER_JOB), this process's rank",
    ),
    "salloc in a step": (
        started.SALLOC_STEP,
        ("alone", 0, 1, None, "nothing announces other ranks"),
        "missing the job's name (job= or BNLAYER_JOB), this process's rank",
    ),
    "sbatch": (
        started.SBATCH,
        ("alone", 0, 1, None, "nothing announces other ranks"),
        "missing the job's name (job= or BNLAYER_JOB), this process's rank",
    ),
    "sbatch in a step": (
        started.SBATCH_IN_STEP,
        ("alone", 0, 1, None, "nothing announces other ranks"),
        "missing the job's name (job= or BNLAYER_JOB), this process's rank",
    ),
    "sbatch in a step of the same form": (
        started.SBATCH_IN_STEP | {"SLURM_STEP_NODELIST": "n2", "SLURM_STEP_NUM_TASKS": "2"},
        ("alone", 0, 1, None, "nothing announces other ranks"),
        "missing the job's name (job= or BNLAYER_JOB), this process's rank",
    ),
    "sbatch in a step of PMI": (
        started.SBATCH_IN_STEP | started.STALE_PMI,
        ("alone", 0, 1, None, "nothing announces other ranks"),
        "missing the job's name (job= or BNLAYER_JOB), this process's rank",
    ),
    "srun in sbatch in a step of PMI": (
        started.SRUN_IN_THAT | started.STALE_PMI,
        (
            *("service", 1, 2, "slurm-4.0"),
            (
                "Slurm's srun announces 2 ranks; SLURM_PROCID says the rank; Slurm's srun names the job slurm-4.0; "
                "rank 0 starts the service at 127.0.0.1:61444"
            ),
        ),
        ("service", 1, 2, "slurm-4.0", f"{AT}SLURM_PROCID says the rank; Slurm's srun names the job slurm-4.0"),
    ),
    "mpiexec in sbatch in a step of PMI": (
        started.SBATCH_IN_STEP | started.STALE_PMI | started.MPICH,
        ("mpi", 1, 2, None, "MPICH's mpiexec started this process; PMI_RANK says the rank"),
        "missing the job's name (job= or BNLAYER_JOB).",
    ),
    "srun": (
        started.SRUN,
        (
            "Slurm's srun announces 4 ranks (this is rank 3) on several hosts, and no address of a statistics service. "
            "Rank 0 can start one at n1:61447, in plain text and without a check of who joins: set BNLAYER_INSECURE=1 "
            "if the network is your own. Or give address= (or BNLAYER_ADDRESS)."
        ),
        ("service", 3, 4, "slurm-7.0", f"{AT}SLURM_PROCID says the rank; Slurm's srun names the job slurm-7.0"),
    ),
    "srun, plain text permitted": (
        started.SRUN | {"BNLAYER_INSECURE": "1"},
        (
            *("service", 3, 4, "slurm-7.0"),
            (
                "Slurm's srun announces 4 ranks; SLURM_PROCID says the rank; Slurm's srun names the job slurm-7.0; "
                "rank 0 starts the service at n1:61447"
            ),
        ),
        ("service", 3, 4, "slurm-7.0", f"{AT}SLURM_PROCID says the rank; Slurm's srun names the job slurm-7.0"),
    ),
    "srun on one node": (
        started.SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n2", "SLURM_STEP_ID": "2"},
        (
            *("service", 3, 4, "slurm-7.2"),
            (
                "Slurm's srun announces 4 ranks; SLURM_PROCID says the rank; Slurm's srun names the job slurm-7.2; "
                "rank 0 starts the service at 127.0.0.1:61569"
            ),
        ),
        ("service", 3, 4, "slurm-7.2", f"{AT}SLURM_PROCID says the rank; Slurm's srun names the job slurm-7.2"),
    ),
    "srun --mpi=pmi2": (
        started.SRUN_PMI2,
        ("mpi", 3, 4, None, "Slurm's srun --mpi=pmi2 started this process; PMI_RANK says the rank"),
        (
            *("service", 3, 4, "slurm-7.0"),
            f"{AT}PMI_RANK says the rank; Slurm's srun --mpi=pmi2 names the job slurm-7.0",
        ),
    ),
    "srun --mpi=pmix": (
        started.SRUN_PMIX,
        ("mpi", 3, 4, None, "Slurm's srun --mpi=pmix started this process; PMIX_RANK says the rank"),
        (
            *("service", 3, 4, "slurm-7.0"),
            f"{AT}PMIX_RANK says the rank; Slurm's srun --mpi=pmix names the job slurm-7.0",
        ),
    ),
    "mpiexec in sbatch": (
        started.SBATCH_MPICH,
        (
            *("mpi", 1, 2, None),
            "MPICH's mpiexec started this process; PMI_RANK says the rank, which beats SLURM_PROCID=0",
        ),
        (
            *("service", 1, 2, "slurm-7.0"),
            f"{AT}PMI_RANK says the rank, which beats SLURM_PROCID=0; Slurm's srun names the job slurm-7.0",
        ),
    ),
    "torchrun in srun": (
        started.SRUN_TORCHRUN | {"RANK": "3", "WORLD_SIZE": "4"},
        (
            "torchrun announces 4 ranks (this is rank 3) on several hosts, and no address of a statistics service. "
            "Rank 0 can start one at localhost, in plain text"
        ),
        (
            *("service", 3, 4, "torchrun-8b1fae09-f274-4f96-a288-65e6a38e35be"),
            (
                f"{AT}RANK says the rank, which beats SLURM_PROCID=1; torchrun names the job "
                "torchrun-8b1fae09-f274-4f96-a288-65e6a38e35be"
            ),
        ),
    ),
    "indexed Job": (
        started.INDEXED_JOB,
        "Kubernetes' indexed Job announces 3 ranks (this is rank 2), but not how they reach each other",
        (
            *("service", 2, 3, "digits"),
            f"{AT}JOB_COMPLETION_INDEX says the rank; Kubernetes' indexed Job names the job digits",
        ),
    ),
    "MPIJob": (
        started.MPI_JOB,
        ("mpi", 1, 2, None, "Open MPI's mpiexec started this process; OMPI_COMM_WORLD_RANK says the rank"),
        "missing the job's name (job= or BNLAYER_JOB).",
    ),
    "explicit": (
        started.EXPLICIT,
        ("service", 1, 2, "mine", f"{AT}BNLAYER_RANK says the rank"),
        ("service", 1, 2, "mine", f"{AT}BNLAYER_RANK says the rank"),
    ),
}


@pytest.mark.parametrize("address", [False, True], ids=["", "address"])
@pytest.mark.parametrize("launcher", LAUNCHED)
def test_in_the_environment_of_each_launcher(launcher: str, address: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process there does, what it is called, and why; a layer does not train alone among other ranks."""
    environ, *expected = LAUNCHED[launcher]
    environ = environ | ADDRESS if address else environ
    wanted = expected[address]
    if isinstance(wanted, str):
        with pytest.raises(ValueError) as caught:
            plan(environ)
        assert wanted in str(caught.value)
    else:
        chosen = plan(environ)
        assert (chosen.transport, chosen.rank, chosen.world_size, chosen.job, chosen.reason) == wanted
        assert bool(chosen.warning) is (chosen.transport == "alone")
    if not launcher.startswith(("salloc", "sbatch")):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        bn = BatchNormalization(synchronized=True)
        with pytest.raises(RuntimeError, match=r"no world was joined, and .* ranks |no world was joined, and prterun"):
            bn([[1.0], [2.0]], training=True)


@pytest.mark.parametrize(("value", "survive"), [("1", True), ("true", True), ("0", False), ("", False), (None, False)])
def test_whether_ranks_survive_each_other(value: str | None, survive: bool) -> None:
    """As `mpirun --with-ft ulfm` says."""
    assert survives_losses({} if value is None else {"OMPI_MCA_mpi_ft_enable": value}) is survive
