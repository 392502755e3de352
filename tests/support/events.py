"""Events of a training run, without training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bnworker.train.events import Epoch, Event, LayerStatistics, Step

STEPS_PER_EPOCH = 5


def step(number: int, *, rows: int = 8, loss: float | None = None) -> Step:
    """A step of 10 ms, of which 4 ms are waited and 1 ms is read; the loss is the number, unless given."""
    return Step(
        number=number,
        epoch=(number - 1) // STEPS_PER_EPOCH + 1,
        loss=float(number) if loss is None else loss,
        accuracy=number / 1000,
        rows=rows,
        learning_rate=0.1 / number,
        seconds=0.01,
        reading_seconds=0.001,
        waiting_seconds=0.004,
    )


def epoch(
    number: int, *, ranks: int = 2, layers: Sequence[str] = ("bn_1", "bn_2"), test_loss: float | None = None
) -> Epoch:
    """An epoch whose numbers follow from its own; rank r waited r + 1 hundredths of a second."""
    channels = np.arange(4.0)
    return Epoch(
        number=number,
        steps=number * STEPS_PER_EPOCH,
        rows=40,
        loss=1 / number,
        accuracy=1 - 0.5 / number,
        test_loss=2 / number if test_loss is None else test_loss,
        test_accuracy=1 - 0.75 / number,
        learning_rate=0.1,
        seconds=0.05,
        waiting=tuple((rank + 1) / 100 for rank in range(ranks)),
        layers=tuple(LayerStatistics(name, channels * number, 1 + channels / number) for name in layers),
    )


def run(epochs: int, *, ranks: int = 2) -> list[Event]:
    """All events of a run of so many epochs."""
    events: list[Event] = []
    for number in range(1, epochs + 1):
        first = (number - 1) * STEPS_PER_EPOCH + 1
        events += [step(each) for each in range(first, first + STEPS_PER_EPOCH)]
        events.append(epoch(number, ranks=ranks))
    return events
