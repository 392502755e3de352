"""The steps, exchanges, traffic and memory of a run, computed from its settings and data without starting it.

Bytes are counted as in `bnworker.statistics.Statistics`: those of the arrays that are given to the transport. They
depend on the model alone, not on the number of rows.
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
# Loss, correctly classified rows, whether a rank could not read its rows, whether one was asked to stop; float64.
_STEP_SUMS = 4
_ENROLLED_LIMBS = 4  # per channel: its grids, besides the two moving statistics
_FLAGS = 3  # int64 numbers of a layer's state
_PROCESS_BYTES = 140 * 2**20  # Python, NumPy, gRPC, and what `digits` imports: measured on Linux, x86-64
_TEMPORARIES = 3  # float64 arrays of a layer's size that its kernels hold at once


@dataclass(frozen=True, slots=True)
class Exchange:
    """One exchange of a step.

    Attributes:
        name: e.g. "bn_1 forward sums".
        bytes: what each rank sends.
    """

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast of a run.

    Attributes:
        parameters: the number of trainable parameters.
        steps_per_epoch, steps: of an epoch, and of the run.
        rows_per_rank: training rows that each rank reads in an epoch.
        epoch: how the training rows are divided among the steps of an epoch.
        step_rows_per_rank: rows of each rank in the largest step, at most.
        exchanges: of one step, in their order.
        start_bytes: what rank 0 sends once: the weights, and the enrolment of the layers.
        probe_bytes: what a rank sends in addition when all layers probe: in the first step, and rarely afterwards.
        evaluation_bytes: what a rank sends after an epoch.
        memory_bytes: an estimate of the memory that a rank needs.
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
        """The bytes that each rank sends in a step."""
        return sum(exchange.bytes for exchange in self.exchanges)


def forecast(settings: Settings, data: Dataset, workers: int) -> Forecast:
    """Compute the forecast of a run.

    Args:
        settings: of the run.
        data: loaded by a world of one.
        workers: how many ranks there will be.

    Raises:
        ValueError: a regularizer's or constraint's name is unknown.
        DataError: an epoch would have no steps.
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
    """Memory of a rank in bytes: the process, the weights, the gradients being reduced, and the arrays of one step."""
    item = np.dtype(settings.dtype).itemsize
    copies = 4 if settings.early_stop is None else 5  # value, gradient, velocity, update; and the best epoch's value
    under_way = dense * (2 * item + _BYTES_OF_INT64)  # sent and received, and added in float64
    outputs = sum(settings.hidden)
    return (
        _PROCESS_BYTES
        + copies * parameters * item
        + under_way
        + rows * (features * item + outputs * (4 * item + _TEMPORARIES * _BYTES_OF_INT64))
    )
