"""Environment variables: which are read, and that one that is set and empty counts as not set, everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from bnlayer.environment import announced, batch_script, prte
from bnlayer.kernels import choice
from bnserver.failpoints import VARIABLE, Failpoints
from bnworker import failure_marker
from bnworker.launcher import mpi
from bnworker.launcher.prefix import Style
from bnworker.plan import plan
from support import environments

_ROOT = Path(__file__).parents[2]
_STEP = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
_ADDRESS = {"BNLAYER_ADDRESS": "h:1", "BNLAYER_JOB": "j", "BNLAYER_RANK": "0", "BNLAYER_WORLD_SIZE": "2"}


def _planned(environ: Mapping[str, str]) -> object:
    """What a process decides by its variables, errors included."""
    try:
        return plan(environ)
    except ValueError as error:
        return str(error)


def _threads(environ: Mapping[str, str]) -> object:
    choice.threads.cache_clear()
    return choice.threads()


def _kernels(environ: Mapping[str, str]) -> object:
    choice.chosen.cache_clear()
    return choice.chosen()


def _allowed(environ: Mapping[str, str]) -> object:
    return mpi.environment(mpi.Vendor.OPEN_MPI, 10**6, Path("/launch"), environ)


def _style(environ: Mapping[str, str]) -> object:
    return Style.of(terminal=True, timestamps=None, environ=environ)


def _file(environ: Mapping[str, str]) -> object:
    return failure_marker._file(environ, "world")


_READERS: dict[Callable[[Mapping[str, str]], object], tuple[str, ...]] = {
    _planned: (
        *("BNLAYER_TRANSPORT", "BNLAYER_ADDRESS", "BNLAYER_JOB", "BNLAYER_TOKEN", "BNLAYER_TOKEN_FILE"),
        *("BNLAYER_RANK", "BNLAYER_WORLD_SIZE", "BNLAYER_LOCAL_SOCKET", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        *("PMI_RANK", "PMI_SIZE", "RANK", "WORLD_SIZE"),
        *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_JOB_ID", "PMI_JOBID"),
        *("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "BNLAYER_INSECURE", "MASTER_ADDR", "MASTER_PORT"),
        *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "LOCAL_WORLD_SIZE"),
        *("ENVIRONMENT", "SLURM_UMASK", "SLURM_GTIDS", "MPI_LOCALNRANKS"),
        *("PMIX_RANK", "PMIX_NAMESPACE", "I_MPI_HYDRA_UUID", "JOB_COMPLETION_INDEX", "HOSTNAME", "TORCHELASTIC_RUN_ID"),
    ),
    announced: ("BNLAYER_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK", "SLURM_PROCID", "SLURM_STEP_ID"),
    batch_script: ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_JOB_ID"),
    prte: ("PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_NAMESPACE"),
    _threads: ("BNLAYER_THREADS",),
    _kernels: ("BNLAYER_KERNELS",),
    _allowed: ("OMPI_MCA_mpi_yield_when_idle", "PRTE_MCA_rmaps_default_mapping_policy"),
    _style: ("NO_COLOR", "TERM"),
    _file: (failure_marker.FOLDER, "BNLAYER_RANK"),
    lambda environ: Failpoints(environ)._asked: (VARIABLE,),
}
_SETTINGS: tuple[dict[str, str], ...] = (
    {},
    environments.SBATCH_IN_STEP | environments.STALE_PMI | {"SLURM_UMASK": "0022"},
    _STEP,
    _ADDRESS,
    {"RANK": "1", "WORLD_SIZE": "2"},
    {"PMI_RANK": "1", "PMI_SIZE": "2"},
    _STEP
    | {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2", "BNLAYER_INSECURE": "1"},
    {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
    {"PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.1.0", "SLURM_NTASKS": "2"},
    _ADDRESS | {"JOB_COMPLETION_INDEX": "1", "HOSTNAME": "j-1", "BNLAYER_JOB": "", "BNLAYER_RANK": ""},
    {"BNLAYER_RANK": "1"},
)


@pytest.mark.parametrize(
    ("read", "name"), [pytest.param(read, name, id=name) for read, names in _READERS.items() for name in names]
)
def test_empty_is_unset(
    read: Callable[[Mapping[str, str]], object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`RANK=` was an error and `BNLAYER_TRANSPORT=` was not: batch scripts pass on what they don't have."""
    for setting in _SETTINGS:
        without = {variable: value for variable, value in setting.items() if variable != name}
        monkeypatch.delenv(name, raising=False)
        expected = read(without)
        monkeypatch.setenv(name, "")
        assert read(without | {name: ""}) == expected
    monkeypatch.undo()
    choice.threads.cache_clear()
    choice.chosen.cache_clear()


def test_nobody_else_reads_variables() -> None:
    """One function decides what an empty one means; the standard library alone is at hand in `mpirank`."""
    own = {"bnlayer/bnlayer/environment.py", "worker/bnworker/launcher/mpirank.py"}
    for folder in ("bnlayer", "server", "worker", "proto"):
        for file in (_ROOT / folder).rglob("*.py"):
            if str(file.relative_to(_ROOT)) not in own:
                uses = re.findall(
                    r"environ\.get\((?!.*\) or )|\bin (?:os\.)?environ\b(?![.:])|\bgetenv|environ\.setdefault",
                    file.read_text(),
                )
                assert not uses, file
