"""Finds mpiexec, and the variables that it needs.

MPICH's (hydra) needs nothing. Open MPI's refuses root and more ranks than cores unless its environment says
otherwise; what the user has set is left alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from bnlayer.environment import variable

_VERSION_S = 20.0  # Open MPI's first start on a cold disk takes seconds


class Vendor(StrEnum):
    """Whose mpiexec it is."""

    MPICH = "MPICH"
    OPEN_MPI = "Open MPI"
    OTHER = "another MPI"


def find(environ: Mapping[str, str]) -> str | None:
    """The mpiexec beside this Python (a wheel's), or the first on PATH."""
    own = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
    return own or shutil.which("mpiexec", path=variable(environ, "PATH"))


def version(mpiexec: str) -> str:
    """The output of `mpiexec --version`; "" where there is none in time."""
    try:
        asked = subprocess.run(
            [mpiexec, "--version"], capture_output=True, text=True, errors="replace", timeout=_VERSION_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout + asked.stderr


def vendor(version_text: str) -> Vendor:
    """The vendor of an mpiexec with this version text."""
    text = version_text.lower()
    if any(name in text for name in ("open mpi", "openrte", "prrte")):
        return Vendor.OPEN_MPI
    return Vendor.MPICH if any(name in text for name in ("hydra", "mpich")) else Vendor.OTHER


def environment(vendor: Vendor, ranks: int, folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that this mpiexec needs in addition.

    Open MPI's mpiexec keeps files of its session in `ompi.PID`. One that is killed leaves them, and the next that has
    its pid ends with "The PMIx server's listener thread failed to start": so they are kept in the launch's own folder.
    """
    if vendor is not Vendor.OPEN_MPI:
        return {}
    needed = {
        "PRTE_MCA_prte_local_tmpdir_base": str(folder),  # version 5
        "OMPI_MCA_orte_local_tmpdir_base": str(folder),  # version 4
    }
    if os.geteuid() == 0:
        needed |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if ranks > len(os.sched_getaffinity(0)):
        needed |= {
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # version 5
            "OMPI_MCA_rmaps_base_oversubscribe": "1",  # version 4
            "OMPI_MCA_mpi_yield_when_idle": "1",  # waiting ranks leave their core to the others
        }
    return {name: value for name, value in needed.items() if variable(environ, name) is None}
