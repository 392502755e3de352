"""The events of a training run. Their order, where [ ] is optional and ( )* repeats:

[Resumed]  ( ( Step  [Saved] )*  Epoch  [Saved] )*
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RECORDED = (
    "number",
    "steps",
    "rows",
    "loss",
    "accuracy",
    "test_loss",
    "test_accuracy",
    "validation_loss",
    "validation_accuracy",
    "learning_rate",
)


@dataclass(frozen=True, slots=True)
class Step:
    """A step was made.

    Attributes:
        number: the step's, from 1.
        epoch: the number of its epoch, from 1.
        loss, accuracy: mean over the step's rows on all ranks, in training mode; the loss without penalties.
        rows: the number of these rows.
        learning_rate: of the step.
        seconds: the duration of the step on this rank, reading included.
        reading_seconds: the part of it spent on reading this rank's rows.
        waiting_seconds: the part of it spent inside exchanges.
    """

    number: int
    epoch: int
    loss: float
    accuracy: float
    rows: int
    learning_rate: float
    seconds: float
    reading_seconds: float
    waiting_seconds: float


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """The moving statistics of one layer, as its owner keeps them.

    Attributes:
        name: the layer's.
        moving_mean, moving_variance: (C,).
    """

    name: str
    moving_mean: NDArray[np.floating]
    moving_variance: NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """An epoch is complete, or the run's last step was made in the middle of it.

    Checkpoints record what depends on the run's settings and data alone; times do not.

    Attributes:
        number: from 1.
        steps: made in the run so far.
        rows: training rows of this epoch on all ranks.
        loss, accuracy: mean over these rows, in training mode; the loss without penalties.
        test_loss, test_accuracy: over the test rows, with the moving statistics.
        validation_loss, validation_accuracy: likewise over the validation rows; None without any.
        learning_rate: of the last step.
        seconds: duration of this epoch's steps in this process; 0 for an epoch before the run was resumed.
        waiting: seconds that each rank spent inside exchanges; empty for an epoch before the run was resumed.
        layers: their statistics after the epoch; empty for an epoch before the run was resumed.
    """

    number: int
    steps: int
    rows: int
    loss: float
    accuracy: float
    test_loss: float
    test_accuracy: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    learning_rate: float
    seconds: float = 0.0
    waiting: tuple[float, ...] = ()
    layers: tuple[LayerStatistics, ...] = ()

    def record(self) -> dict[str, Any]:
        """The fields that depend on settings and data alone; `Epoch(**record)` is the inverse."""
        return {name: getattr(self, name) for name in _RECORDED}


@dataclass(frozen=True, slots=True)
class Resumed:
    """The run was resumed from a checkpoint; the first event of such a run.

    Attributes:
        steps: made before.
        epochs: the complete ones.
    """

    steps: int
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint was written; only the rank that wrote it gets this event.

    Attributes:
        steps: made in the run so far.
    """

    steps: int


Event = Step | Epoch | Resumed | Saved
