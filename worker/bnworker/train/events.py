"""The events of a training run, in the order in which they happen.

[Resumed]  ( Step  [Saved] )*  Epoch  [Saved]   …   and so on for every epoch
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
        number: of the step, from 1.
        epoch: from 1.
        loss, accuracy: mean over the step's rows, of all ranks, while training; the loss without penalties.
        rows: of the step, of all ranks.
        learning_rate: of the step.
        seconds: that it took, reading its rows included.
        reading_seconds: of them, for this rank's rows.
        waiting_seconds: of them, inside exchanges.
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
    """An epoch is over, or the last step was made within it.

    What depends on the run's settings and data alone is recorded in checkpoints; times are not.

    Attributes:
        number: from 1.
        steps: made so far.
        rows: trained on in this epoch, of all ranks.
        loss, accuracy: mean over these rows, while training; the loss without penalties.
        test_loss, test_accuracy: over the test rows, with the moving statistics.
        validation_loss, validation_accuracy: likewise over the validation rows; None without any.
        learning_rate: of the last step.
        seconds: spent in this epoch's steps, by this process: 0 for an epoch of before it was resumed.
        waiting: seconds of them inside exchanges, of each rank; empty for an epoch of before.
        layers: their statistics after the epoch; empty for an epoch of before.
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
        """What depends on settings and data alone; `Epoch(**record)` is the way back."""
        return {name: getattr(self, name) for name in _RECORDED}


@dataclass(frozen=True, slots=True)
class Resumed:
    """The run goes on from a checkpoint; comes first, if at all.

    Attributes:
        steps: made before.
        epochs: that were complete.
    """

    steps: int
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint was written; only the rank that writes it gets this event.

    Attributes:
        steps: made so far.
    """

    steps: int


Event = Step | Epoch | Resumed | Saved
