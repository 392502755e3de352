"""The main job: data-parallel training whose result does not depend on the number of ranks.

Laws:
1. `data` decides the rows of a step. Each rank takes its share of them without padding; a rank's share may be empty.
2. A model is evaluated with the owner's moving statistics.
3. A run begins with rank 0's state, new or from a checkpoint. Statistics that the owner holds from an earlier run are
   replaced by it.
4. The state after a step determines everything that follows: a run that is resumed from a checkpoint makes the same
   steps, bit for bit, as the run that wrote it would have made on the same number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from bnworker.train.checkpoint import BEST, VELOCITY, Checkpoint, Origin, Progress
from bnworker.train.data import Batch, Dataset
from bnworker.train.evaluation import Scores, evaluate
from bnworker.train.events import Epoch, Event, LayerStatistics, Resumed, Saved, Step
from bnworker.train.model import Perceptron, perceptron
from bnworker.train.optimizer import SGD
from bnworker.train.owned_statistics import UpdateCount, replace_owned
from bnworker.train.settings import Settings
from bnworker.train.steps import step
from bnworker.world import World


class DivergedError(Exception):
    """The loss is NaN or infinite."""


class StoppedError(Exception):
    """A rank was asked to stop before the run was complete; all ranks stopped after the same step, and saved it.

    Attributes:
        steps: how many had been made.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(f"The run was stopped after step {steps:,}.")
        self.steps = steps


@dataclass(frozen=True, slots=True)
class Replica:
    """Which part of every step's rows this world takes: all of them, except in a run of unsynchronized replicas.

    Attributes:
        index: this world's number.
        count: the number of worlds that train side by side without exchanging anything.
    """

    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Saving:
    """When checkpoints are written: after every epoch, at the end of the run, and every so many steps if asked for.

    Attributes:
        write: writes a checkpoint; only rank 0 calls it.
        every: steps between two checkpoints; None: only after each epoch and at the end.
    """

    write: Callable[[Checkpoint], None]
    every: int | None = None


Keep = Callable[[Checkpoint], None]
"""Keeps the state after a step in memory, on every rank; after a loss the ranks of an elastic job resume from it."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a run.

    Attributes:
        model: the trained model; its layers hold the owner's moving statistics. With early stopping it is the model
            of the epoch with the lowest validation loss.
        optimizer: its velocities are those after the last step.
        labels: output k of the model stands for `labels[k]`.
        epochs: one entry for each epoch, including those before the run was resumed.
        kept: the number of the epoch that the model is of.
        test_loss, test_accuracy: of the model.
        resumed_steps: steps made before this process resumed the run; 0 if it began the run.
        rows, seconds: training rows of all ranks in the steps that this process made, and the seconds that these took.
        updates: how many training steps the moving statistics of each layer contain, by its name: see `UpdateCount`.
    """

    model: Perceptron
    optimizer: SGD
    labels: tuple[int, ...]
    epochs: tuple[Epoch, ...]
    kept: int
    test_loss: float
    test_accuracy: float
    resumed_steps: int
    rows: int
    seconds: float
    updates: Mapping[str, int]

    @property
    def steps(self) -> int:
        """How many steps were made, including those before the run was resumed."""
        return self.epochs[-1].steps


def train(
    settings: Settings,
    data: Dataset,
    world: World,
    replica: Replica = Replica(),
    watch: Callable[[Event], None] = lambda _: None,
    *,
    start: Checkpoint | None = None,
    initial: Mapping[str, NDArray[Any]] | None = None,
    saving: Saving | None = None,
    stop: Callable[[], bool] = lambda: False,
    keep: Keep | None = None,
) -> Outcome:
    """Train; every rank of the world calls it with the same arguments.

    Args:
        settings: of the run.
        data: loaded for this world.
        world: the ranks that train together.
        replica: this world's part of the rows.
        watch: called with each event.
        start: the checkpoint to resume from; None: begin a new run.
        initial: the weights to begin with, see `Perceptron.begin`; None: they are drawn by the seed.
        saving: when and how to write checkpoints; None: write none.
        stop: called in every step; returns whether this rank is to stop. If one rank stops, all stop.
        keep: called after every step of an elastic job, which also admits waiting ranks after each epoch; None: the
            job is not elastic.

    Raises:
        ValueError: the data was loaded for another world, or a regularizer's or constraint's name is unknown.
        CheckpointError: on every rank: `start` belongs to another run.
        DataError: on every rank: a rank could not read its rows.
        DivergedError: on every rank: the loss is NaN or infinite.
        StoppedError: on every rank: a rank was asked to stop.
        CollectiveError: another rank is lost, or disagrees.
    """
    if (data.rank, data.world_size) != (world.rank, world.world_size):
        raise ValueError(
            f"train(data=): it was loaded for rank {data.rank} of {data.world_size}, and this is rank {world.rank} of "
            f"{world.world_size}: expected load(..., world=world)."
        )
    run = _Run(settings, data, world, replica, watch, saving, start, initial, stop, keep)
    while not run.over:
        run.epoch()
    return run.outcome()


class _Run:
    """One run: its model and its progress."""

    def __init__(
        self,
        settings: Settings,
        data: Dataset,
        world: World,
        replica: Replica,
        watch: Callable[[Event], None],
        saving: Saving | None,
        start: Checkpoint | None,
        initial: Mapping[str, NDArray[Any]] | None,
        stop: Callable[[], bool],
        keep: Keep | None,
    ) -> None:
        settings = settings.completed(None if start is None else start.settings)
        self._settings, self._data, self._world, self._replica = settings, data, world, replica
        self._watch, self._stop, self._keep = watch, stop, keep
        self._saving = saving if world.rank == 0 else None
        self._origin = Origin.of(data)
        self._steps_per_epoch = data.steps_per_epoch(settings.batch_size, settings.last_batch)
        self._last = settings.total_steps(self._steps_per_epoch)
        self._model = perceptron(settings, data.features, data.classes)
        self._optimizer = SGD(
            [*self._model.dense_weights, *self._model.norm_weights],
            learning_rate=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            decayed=[dense.kernel for dense in self._model.dense],
        )
        self._progress = Progress()
        self._best: dict[str, NDArray[Any]] = {}
        self._unfinished: Epoch | None = None  # the last epoch, if --steps ends the run in the middle of it
        self._rows, self._seconds = 0, 0.0
        self._saved_steps: int | None = None
        self._stopping = False
        if start is not None:
            self._resume(start)
        elif initial is not None:
            self._model.begin(initial)
        self._resumed_steps = self._progress.steps
        self._synchronize()
        if start is not None:
            watch(Resumed(self._progress.steps, self._progress.epochs))

    # ---- start ----

    def _resume(self, start: Checkpoint) -> None:
        start.refuse_other_settings(self._settings)
        start.refuse_other_data(self._origin)
        self._progress = start.progress
        if self._settings.early_stop is not None and self._progress.best is not None:
            self._best = self._model.tensors(0)  # only names, shapes and dtypes are read; the arrays are loaded below
        start.refuse_other_tensors(self._tensors())
        self._model.load(start.tensors)
        self._best = {name: start.tensors[f"{BEST}{name}"] for name in self._best}
        velocities = [start.tensors[f"{VELOCITY}{name}"] for name in self._named_velocities()]
        order = {id(weight): number for number, weight in enumerate(self._optimizer.weights)}
        for weight, velocity in zip(self._model.named_weights().values(), velocities, strict=True):
            self._optimizer.velocities[order[id(weight)]] = velocity

    def _synchronize(self) -> None:
        """Make rank 0's state everyone's: the owner's statistics, and the weights of all ranks."""
        replace_owned(self._model, self._world)
        self._updates = UpdateCount(self._model, self._progress.steps)
        # All ranks draw them from the same seed, but another NumPy version might draw other numbers.
        weights = self._optimizer.weights
        for weight, value in zip(weights, self._world.broadcast([weight.value for weight in weights]), strict=True):
            weight.assign(value)

    # ---- steps and epochs ----

    @property
    def over(self) -> bool:
        """Whether the run is complete: no step is left, or early stopping ended it."""
        return self._progress.steps >= self._last or self._stopped_early()

    def _stopped_early(self) -> bool:
        best, patience = self._progress.best, self._settings.early_stop
        return best is not None and patience is not None and len(self._progress.epochs) - best.number >= patience

    def epoch(self) -> None:
        """Make the remaining steps of an epoch, or of the run; then evaluate the model.

        Raises:
            StoppedError: a rank was asked to stop. A complete epoch is evaluated first.
        """
        number, world = len(self._progress.epochs) + 1, self._world
        first = self._progress.steps - (number - 1) * self._steps_per_epoch
        replica = (self._replica.index, self._replica.count)
        settings = self._settings
        batches = self._data.batches(
            settings.batch_size, settings.seed, number, first, replica, last_batch=settings.last_batch
        )
        seconds, waited = 0.0, 0.0
        for _ in range(min(self._steps_per_epoch - first, self._last - self._progress.steps)):
            made = self._step(batches, number)
            if self._keep is not None:
                self._keep(self._checkpoint())
            seconds, waited = seconds + made.seconds, waited + made.waiting_seconds
            self._watch(made)
            if self._stopping and not self._evaluation_follows(number):
                self._save()
                raise StoppedError(self._progress.steps)
            if self._due():
                self._save()
        self._seconds += seconds
        evaluated = self._evaluated(number, evaluate(self._model, self._data, world, waited), seconds)
        if self._progress.steps == number * self._steps_per_epoch:
            self._progress = Progress(self._progress.steps, (*self._progress.epochs, evaluated))
            if self._settings.early_stop is not None and self._progress.best is evaluated:
                self._best = self._model.tensors(evaluated.steps)
        else:
            self._unfinished = evaluated
        self._watch(evaluated)
        self._save()
        if self._keep is not None:
            self._keep(self._checkpoint())
            self._world.admit()
        if self._stopping and not self.over:
            raise StoppedError(self._progress.steps)

    def _evaluation_follows(self, epoch: int) -> bool:
        """Whether the step that was just made is the last one of the epoch or of the run."""
        return self._progress.steps in (self._last, epoch * self._steps_per_epoch)

    def _step(self, batches: Iterator[Batch], epoch: int) -> Step:
        begun, waited = time.perf_counter(), self._world.statistics.waiting_seconds
        batch = next(batches)
        read = time.perf_counter()
        before = self._progress
        number = before.steps + 1
        rate = self._settings.learning_rate_of(number, self._steps_per_epoch)
        self._optimizer.learning_rate = rate
        loss_sum, correct, self._stopping = step(self._model, self._optimizer, batch, self._world, stop=self._stop())
        loss = loss_sum / max(1, batch.rows)
        _refuse_divergence(loss, f"The loss of step {number}")
        self._progress = Progress(
            number, before.epochs, before.loss_sum + loss_sum, before.correct + correct, before.rows + batch.rows
        )
        self._rows += batch.rows
        return Step(
            number,
            epoch,
            loss,
            correct / max(1, batch.rows),
            batch.rows,
            rate,
            seconds=time.perf_counter() - begun,
            reading_seconds=read - begun,
            waiting_seconds=self._world.statistics.waiting_seconds - waited,
        )

    def _evaluated(self, number: int, scores: Scores, seconds: float) -> Epoch:
        for loss in (scores.test_loss, scores.validation_loss):
            _refuse_divergence(0.0 if loss is None else loss, f"The loss over held-out rows after epoch {number}")
        made = self._progress
        return Epoch(
            number=number,
            steps=made.steps,
            rows=made.rows,
            loss=made.loss_sum / max(1, made.rows),
            accuracy=made.correct / max(1, made.rows),
            test_loss=scores.test_loss,
            test_accuracy=scores.test_accuracy,
            validation_loss=scores.validation_loss,
            validation_accuracy=scores.validation_accuracy,
            learning_rate=self._settings.learning_rate_of(max(1, made.steps), self._steps_per_epoch),
            seconds=seconds,
            waiting=scores.waiting,
            layers=tuple(
                LayerStatistics(norm.name, norm.state.moving.mean, norm.state.moving.variance)
                for norm in self._model.norms
            ),
        )

    # ---- checkpoints ----

    def _due(self) -> bool:
        """Whether a checkpoint is due within an epoch; after an epoch's last step the evaluation comes first."""
        steps, every = self._progress.steps, self._saving.every if self._saving is not None else None
        return every is not None and steps % every == 0 and steps % self._steps_per_epoch != 0

    def _save(self) -> None:
        if self._saving is None or self._saved_steps == self._progress.steps:
            return
        self._saving.write(self._checkpoint())
        self._saved_steps = self._progress.steps
        self._watch(Saved(self._progress.steps))

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self._tensors(), self._progress, self._settings.as_json(), self._origin)

    def _tensors(self) -> dict[str, NDArray[Any]]:
        tensors = self._model.tensors(self._progress.steps)
        tensors |= {f"{VELOCITY}{name}": velocity for name, velocity in self._named_velocities().items()}
        return tensors | {f"{BEST}{name}": tensor for name, tensor in self._best.items()}

    def _named_velocities(self) -> dict[str, NDArray[Any]]:
        of = dict(zip(map(id, self._optimizer.weights), self._optimizer.velocities, strict=True))
        return {name: of[id(weight)] for name, weight in self._model.named_weights().items()}

    # ---- result ----

    def outcome(self) -> Outcome:
        """The result: the best epoch's model with early stopping, otherwise the last one."""
        made = self._progress
        if self._unfinished is None and made.steps > len(made.epochs) * self._steps_per_epoch:
            # The run was resumed in the middle of an epoch, with no step left to make.
            self._unfinished = self._evaluated(
                len(made.epochs) + 1, evaluate(self._model, self._data, self._world), 0.0
            )
            self._watch(self._unfinished)
        epochs = made.epochs if self._unfinished is None else (*made.epochs, self._unfinished)
        kept = epochs[-1]
        if self._best and made.best is not None and made.best is not kept:
            kept = made.best
            self._model.load(self._best)
            replace_owned(self._model, self._world)
            self._updates = UpdateCount(self._model, kept.steps)
        return Outcome(
            self._model,
            self._optimizer,
            self._data.labels,
            epochs,
            kept.number,
            kept.test_loss,
            kept.test_accuracy,
            self._resumed_steps,
            self._rows,
            self._seconds,
            self._updates.by_layer(),
        )


def _refuse_divergence(loss: float, what: str) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"{what} is {loss}: try a lower --learning-rate.")
