"""What a run will do and cost, computed from its settings and data, before anything is started.

Laws:
1. Bytes are those of arrays and words handed to the transport, as `Statistics` counts them: they follow from the
   model alone, never from rows.
2. A forecast starts nothing and exchanges nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bnlayer.gradients import GradientSums
from bnlayer.moments import Moments
from bnlayer.precision import precision_of
from bnworker.train.data import Dataset, EpochSteps
from bnworker.train.model import perceptron
from bnworker.train.settings import Settings

_BYTES_OF_INT64 = 8  # and of float64
# The loss, the rows classified rightly, whether a rank could not read its rows, whether one is asked to end; float64.
_STEP_SUMS = 4
_ENROLLED_LIMBS = 4  # a channel's grids, beside its two moving statistics
_FLAGS = 3  # words of a layer's state
_PROCESS_BYTES = 140 * 2**20  # Python, NumPy, gRPC, and what `digits` imports: measured on Linux, x86-64
_TEMPORARIES = 3  # float64 arrays of a layer's size that its kernels hold at once


@dataclass(frozen=True, slots=True)
class Exchange:
    """One exchange of a step.

    Attributes:
        name: e.g. "bn_1 forward sums".
        bytes: that each rank sends.
    """

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will do.

    Attributes:
        parameters: trainable numbers.
        steps_per_epoch, steps: how many.
        rows_per_rank: training rows that each rank reads in an epoch.
        epoch: how the training rows are divided among the steps of an epoch.
        step_rows_per_rank: the most rows that each rank has in the largest step.
        exchanges: of one step, in their order.
        start_bytes: that rank 0 sends once: the weights, and what makes the layers known.
        probe_bytes: that a rank sends more where all layers look for their grids: in the first step, and rarely after.
        evaluation_bytes: that a rank sends after an epoch.
        memory_bytes: that a rank needs, at a guess.
    """

    parameters: int
    steps_per_epoch: int
    steps: int
    rows_per_rank: tuple[int, ...]
    epoch: EpochSteps
    step_rows_per_rank: tuple[int, ...]
    exchanges: tuple[Exchange, ...]
    start_bytes: int
    probe_bytes: int
    evaluation_bytes: int
    memory_bytes: int

    @property
    def step_bytes(self) -> int:
        """That each rank sends in a step."""
        return sum(exchange.bytes for exchange in self.exchanges)


def forecast(settings: Settings, data: Dataset, workers: int) -> Forecast:
    """What a run will do.

    Args:
        settings: of the run.
        data: loaded by a world of one.
        workers: how many ranks there will be.

    Raises:
        ValueError: a regularizer's or constraint's name is unknown.
        DataError: an epoch would have no step.
    """
    epoch = data.epoch_steps(settings.batch_size, settings.last_batch)
    model = perceptron(settings, data.features, data.classes)
    item, folds = np.dtype(settings.dtype).itemsize, precision_of(settings.dtype).folds
    dense = sum(weight.value.size for weight in model.dense_weights)
    parameters = dense + sum(weight.value.size for weight in model.norm_weights)
    forward = [
        Exchange(f"{norm.name} forward sums", Moments.rows(folds) * _BYTES_OF_INT64 * norm.state.channels)
        for norm in model.norms
    ]
    backward = [
        Exchange(f"{norm.name} backward sums", GradientSums.rows(folds) * _BYTES_OF_INT64 * norm.state.channels)
        for norm in reversed(model.norms)
    ]
    gradients = Exchange("allreduce of the Dense gradients", dense * item + _STEP_SUMS * _BYTES_OF_INT64)
    channels = sum(norm.state.channels for norm in model.norms)
    states = channels * (2 * item + _ENROLLED_LIMBS * _BYTES_OF_INT64) + len(model.norms) * _FLAGS * _BYTES_OF_INT64
    per_rank = data.rows_per_rank(workers)
    step_rows = tuple(math.ceil(epoch.largest * rows / data.rows) for rows in per_rank)
    return Forecast(
        parameters,
        epoch.count,
        settings.total_steps(epoch.count),
        per_rank,
        epoch,
        step_rows,
        (*forward, *backward, gradients),
        start_bytes=parameters * item + states,
        probe_bytes=2 * 2 * _BYTES_OF_INT64 * channels,
        evaluation_bytes=(5 + workers) * _BYTES_OF_INT64,
        memory_bytes=_memory(settings, data.features, parameters, dense, max(step_rows)),
    )


def _memory(settings: Settings, features: int, parameters: int, dense: int, rows: int) -> int:
    """The process, the weights' arrays, the gradients under way and the arrays of one step."""
    item = np.dtype(settings.dtype).itemsize
    copies = 4 if settings.early_stop is None else 5  # value, gradient, velocity, update; the best epoch's
    under_way = dense * (2 * item + _BYTES_OF_INT64)  # sent and received, and added in float64
    outputs = sum(settings.hidden)
    return (
        _PROCESS_BYTES
        + copies * parameters * item
        + under_way
        + rows * (features * item + outputs * (4 * item + _TEMPORARIES * _BYTES_OF_INT64))
    )
