"""What was lately seen of each layer: quantiles of its moving statistics over time, and whether they drift.

Bounded: the layers that are kept at a time, and the samples of each. Nothing is kept of a job that is over.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer.state import LayerState
from bnserver.core.drift import Band, Drift, followed
from bnserver.core.observation import JobObservation

SAMPLES = 600  # of a layer: ten minutes
LAYERS = 500  # of all jobs
ALARMS = 50  # that are remembered
QUANTILES = (0, 25, 50, 75, 100)  # in percent
_BINS = 32
_SHOWN_CHANNELS = 2**16  # more are thinned out: these are statistics of statistics

_Row = tuple[float, int, tuple[float, ...], tuple[float, ...]]


@dataclass(slots=True)
class _Layer:
    state: LayerState
    band: Band
    drifts: tuple[Drift, ...] = ()
    rows: deque[_Row] = field(default_factory=lambda: deque(maxlen=SAMPLES))


class History:
    """The layers of all jobs that are not over.

    Attributes:
        alarms: the latest drifts, the last one first, as JSON has them.
        left_out: layers that are not kept: there are too many.
    """

    def __init__(self) -> None:
        self.alarms: deque[dict[str, Any]] = deque(maxlen=ALARMS)
        self.left_out = 0
        self._layers: dict[tuple[str, str], _Layer] = {}

    def add(self, jobs: Iterable[JobObservation], now: float) -> None:
        """Take a sample of every layer whose statistics have changed.

        Args:
            jobs: all that are not over.
            now: seconds since 1970.
        """
        there: dict[tuple[str, str], _Layer] = {}
        self.left_out = 0
        for job in jobs:
            for name, state in job.states.items():
                key = job.job, name
                if len(there) >= LAYERS and key not in self._layers:
                    self.left_out += 1
                    continue
                there[key] = self._sampled(key, self._layers.get(key), state, now)
        self._layers = there

    def layers(self, job: str) -> list[dict[str, Any]]:
        """A job's layers, as JSON has them."""
        return [
            {
                "layer": name,
                "version": layer.state.version,
                "channels": layer.state.channels,
                "drifts": [_described(drift) for drift in layer.drifts],
            }
            for (of, name), layer in self._layers.items()
            if of == job
        ]

    def series(self, job: str, name: str) -> dict[str, Any] | None:
        """A layer's statistics over time, and how they are distributed over its channels now; None: it is not kept."""
        layer = self._layers.get((job, name))
        if layer is None:
            return None
        moving = layer.state.moving
        return {
            "job": job,
            "layer": name,
            "version": layer.state.version,
            "time": [row[0] for row in layer.rows],
            "versions": [row[1] for row in layer.rows],
            "quantiles": QUANTILES,
            "mean": [list(column) for column in zip(*(row[2] for row in layer.rows), strict=True)],
            "variance": [list(column) for column in zip(*(row[3] for row in layer.rows), strict=True)],
            "mean_distribution": _distribution(_thinned(moving.mean)),
            "variance_distribution": _distribution(_thinned(moving.variance)),
        }

    def _sampled(self, key: tuple[str, str], layer: _Layer | None, state: LayerState, now: float) -> _Layer:
        mean_C, variance_C = _thinned(state.moving.mean), _thinned(state.moving.variance)
        if layer is None or layer.state.channels != state.channels:
            layer = _Layer(state, Band.around(mean_C, variance_C))
        elif layer.state.moving is state.moving:
            return layer
        else:
            before = {drift.what for drift in layer.drifts}
            layer.state = state
            layer.band, layer.drifts = followed(layer.band, mean_C, variance_C)
            for drift in layer.drifts:
                if drift.what not in before:
                    alarm = {"time": now, "job": key[0], "layer": key[1], "version": state.version}
                    self.alarms.appendleft(alarm | _described(drift))
        layer.rows.append((now, state.version, _quantiles(mean_C), _quantiles(variance_C)))
        return layer


def described(job: JobObservation) -> Mapping[str, Any]:
    """A job and its ranks, as JSON has them."""
    call = job.call
    return {
        "job": job.job,
        "state": job.phase.name.lower(),
        "generation": job.generation,
        "world_size": job.world_size,
        "completed": job.completed,
        "where": call.where if call is not None else "",
        "version": job.version,
        "took": job.took,
        "took_seconds": job.took_seconds,
        "ranks": [
            {
                "rank": rank.peer.rank,
                "where": f"{rank.peer.host}:{rank.peer.pid}",
                "connected": rank.is_connected,
                "waited_s": rank.waited,
                "held_up_s": rank.held_up,
                "waiting_s": rank.waiting,
                "awaited_s": rank.awaited,
                "straggler": rank.is_straggler,
            }
            for rank in job.ranks
        ],
    }


def _described(drift: Drift) -> dict[str, Any]:
    return {
        "what": drift.what,
        "channels": drift.channels,
        "channel": drift.channel,
        "before": drift.before,
        "now": drift.now,
    }


def _thinned(values: NDArray[Any]) -> NDArray[np.float64]:
    step = math.ceil(len(values) / _SHOWN_CHANNELS)
    return values[::step].astype(np.float64)


def _quantiles(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(np.percentile(values, QUANTILES).tolist())


def _distribution(values: NDArray[np.float64]) -> dict[str, list[float]]:
    low, high = float(values.min()), float(values.max())
    if not high - low > 1e-12 * max(abs(low), abs(high)):  # also where they are alike but for rounding
        return {"from": [low], "to": [high], "channels": [float(len(values))]}
    counts, edges = np.histogram(values, _BINS, (low, high))
    return {"from": edges[:-1].tolist(), "to": edges[1:].tolist(), "channels": counts.astype(float).tolist()}
