"""Batch normalization whose statistics are exact across any set of processes.

`BatchNormalization` is Keras's layer on NumPy. With `synchronized=True` its statistics and gradients are those
of the union of all ranks' batches, bit for bit, through whatever `Collective` is current: `bnworker.join()`
makes one over MPI or a statistics service; without one, the process is a world of one.
"""

from bnlayer.calibration import calibrating
from bnlayer.collective import Alone, Collective
from bnlayer.errors import CollectiveError, MismatchError, PeerLostError, ServiceError, StallError
from bnlayer.layer import BatchNormalization

__all__ = [
    "Alone",
    "BatchNormalization",
    "Collective",
    "CollectiveError",
    "MismatchError",
    "PeerLostError",
    "ServiceError",
    "StallError",
    "calibrating",
]
