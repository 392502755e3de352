"""Batch normalization whose statistics are exact across any set of processes.

`BatchNormalization` is Keras's layer on NumPy. With `synchronized=True` its statistics and gradients are those
of the union of all ranks' batches, bit for bit, through whatever `Collective` is current: `bnworker.join()`
makes one over MPI or a statistics service; without one, the process is a world of one.
"""

from typing import Any

from bnlayer.calibration import calibrating
from bnlayer.collective import Alone, Collective
from bnlayer.errors import (
    CollectiveError,
    JobFinishedError,
    MismatchError,
    PeerLostError,
    RegroupError,
    ServiceError,
    StallError,
)
from bnlayer.layer import BatchNormalization
from bnlayer.running import RunningMoments, moments

__all__ = [
    "Alone",
    "BatchNormalization",
    "Collective",
    "CollectiveError",
    "JobFinishedError",
    "MismatchError",
    "PeerLostError",
    "RegroupError",
    "RunningMoments",
    "ServiceError",
    "StallError",
    "calibrating",
    "moments",
]


def __getattr__(name: str) -> Any:
    """`__version__`, the installed distribution's, and modules: who does not ask does not wait for them."""
    if name == "__version__":
        from importlib.metadata import version

        return version("bnlayer")
    if name in ("constraints", "regularizers"):
        from importlib import import_module

        return import_module(f"bnlayer.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
