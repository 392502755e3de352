"""The ranks of a job: `join()` makes this process one of them, over MPI or a statistics service.

import bnworker

with bnworker.join() as world:
    total, = world.allreduce([loss])
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnlayer.errors import (
        CollectiveError,
        JobFinishedError,
        MismatchError,
        PeerLostError,
        RegroupError,
        ServiceError,
        StallError,
    )
    from bnworker.checkpointing import CheckpointError
    from bnworker.elastic_job import State, elastic
    from bnworker.following import MovingStatistics, follow
    from bnworker.joining import join
    from bnworker.world import World

# Before gRPC is imported: its fork handlers hang the children of a process pool about every second time.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = os.environ.get("GRPC_ENABLE_FORK_SUPPORT") or "0"

__all__ = [
    "CheckpointError",
    "CollectiveError",
    "JobFinishedError",
    "MismatchError",
    "MovingStatistics",
    "PeerLostError",
    "RegroupError",
    "ServiceError",
    "StallError",
    "State",
    "World",
    "elastic",
    "follow",
    "join",
]

_MODULES = {
    "CheckpointError": "bnworker.checkpointing",
    "MovingStatistics": "bnworker.following",
    "State": "bnworker.elastic_job",
    "World": "bnworker.world",
    "elastic": "bnworker.elastic_job",
    "follow": "bnworker.following",
    "join": "bnworker.joining",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line shares this package, and must respond before NumPy is loaded."""
    if name == "__version__":
        from importlib.metadata import version

        return version("bnlayer")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "bnlayer.errors")), name)
    globals()[name] = value
    return value
