"""`bnlayer calibrate`: a trained model's moving statistics are estimated again, over all its training rows.

Every rank runs its share of each batch through the model in training mode; what the layers exchange for it is pooled
exactly (see `bnlayer.calibration`). Weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from bnlayer import calibrating
from bnworker.train.checkpoint import BEST, Checkpoint, CheckpointError
from bnworker.train.data import Dataset, raise_on_every_rank, spelled
from bnworker.train.evaluation import Scores, evaluate
from bnworker.train.model import perceptron
from bnworker.train.settings import Settings, SettingsError
from bnworker.world import World


@dataclass(frozen=True, eq=False)
class Calibrated:
    """The result of a calibration.

    Attributes:
        checkpoint: the given one with the new statistics.
        before, after: scores on the validation and test rows with the old and the new statistics.
        rows: the number of rows that the new statistics are of.
    """

    checkpoint: Checkpoint
    before: Scores
    after: Scores
    rows: int


def settings_of(checkpoint: Checkpoint) -> Settings:
    """The settings of the run that wrote a checkpoint.

    Raises:
        CheckpointError: this version does not have these settings.
    """
    try:
        saved = dict(checkpoint.settings)
        return Settings(**{**saved, "hidden": tuple(saved["hidden"])})
    except (KeyError, TypeError, SettingsError) as error:
        raise CheckpointError(
            f"{checkpoint.name} was written with settings that this version lacks: {error}."
        ) from None


def calibrate(
    checkpoint: Checkpoint,
    data: Dataset,
    world: World,
    batch_size: int,
    watch: Callable[[int], None] = lambda _: None,
) -> Calibrated:
    """Replace the moving statistics of a checkpoint's model by those of all training rows; every rank calls it.

    Args:
        checkpoint: the same on every rank.
        data: loaded for this world, with the checkpoint's labels.
        world: the ranks.
        batch_size: rows of a step, of all ranks together: each is normalized with its own statistics.
        watch: called after each step with the number of its rows.

    Raises:
        CheckpointError: the checkpoint does not fit the data.
        DataError: on every rank: a row is invalid.
        ValueError: a layer's input contains NaN or Inf.
        CollectiveError: another rank is lost, or disagrees.
    """
    settings = settings_of(checkpoint)
    if (data.features, data.labels) != (checkpoint.data.features, checkpoint.data.labels):
        raise CheckpointError(
            f"{checkpoint.name} belongs to data of {checkpoint.data.features} features and {checkpoint.data.classes} "
            f"classes ({spelled(checkpoint.data.labels)}); {data.name} has {data.features} and {data.classes} "
            f"({spelled(data.labels)})."
        )
    model = perceptron(settings, data.features, data.classes)
    checkpoint.refuse_other_tensors(model.tensors(0))
    model.load(checkpoint.best_weights())
    before = evaluate(model, data, world)
    rows = 0
    with calibrating(model.norms):
        for batch in data.batches(batch_size, settings.seed, 1):
            model(batch.x, training=True)
            raise_on_every_rank(world, batch.problem)
            rows += batch.rows
            watch(batch.rows)
    if world.rank == 0:
        for norm in model.norms:
            world.push(norm)
    world.barrier()  # no rank pulls before the owner has them
    after = evaluate(model, data, world)
    return Calibrated(_with_statistics(checkpoint, model.tensors(checkpoint.progress.steps)), before, after, rows)


def _with_statistics(checkpoint: Checkpoint, tensors: dict[str, NDArray[Any]]) -> Checkpoint:
    """The checkpoint with other layer states for its result, which is the best epoch's model where it has one."""
    prefix = BEST if any(name.startswith(BEST) for name in checkpoint.tensors) else ""
    states = {f"{prefix}{name}": tensor for name, tensor in tensors.items() if "/state/" in name}
    return replace(checkpoint, tensors={**checkpoint.tensors, **states})
