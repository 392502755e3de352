"""Elastic jobs: a loop that goes on when ranks are lost, and when others join.

    state = bnworker.State(layers=[norm], kernel=kernel, step=0)
    for generation in bnworker.elastic(state, min=2, max=8):
        with generation as world:
            while state.step < 1000:
                ...
                state.step += 1
                state.commit()

Laws:
1. What a rank goes on from is a state that one rank saved as a whole: weights, statistics and grids of one step. It is
   that of the rank which has saved most often; of several, the lowest, which is one that was there before.
2. The owner's statistics follow: when a generation begins they are set to those of the state, so what was exchanged
   after it was saved counts nowhere.
3. A job is finished when all ranks of one generation have left their block without an error, together.
4. Errors other than `RegroupError` end the loop: they are for people.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.environment import variable
from bnlayer.errors import JobFinishedError, MismatchError, RegroupError
from bnworker import failure_marker, limits
from bnworker.joining import Placement, join_elastic
from bnworker.limits import Limits
from bnworker.synchronizing import contents, described, taken
from bnworker.world import World

logger = logging.getLogger("bnworker")

_KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str, "bytes": bytes}  # bool is an int, too


class Recoverable(Protocol):
    """What the ranks of an elastic job go on from."""

    @property
    def saves(self) -> int:
        """How often it was saved, on whichever rank; 0: never yet."""

    def packed(self) -> list[NDArray[Any]]:
        """What was saved last; where nothing was, what the job begins with."""

    def take(self, world: World, saves: int, arrays: list[NDArray[Any]]) -> None:
        """Go on from what a rank had packed, as every rank of the world does."""


class State:
    """Layers and values that the ranks of an elastic job share, as attributes.

        state = State(layers=[norm], kernel=kernel, step=0)
        state.kernel = state.kernel - rate * gradient
        state.step += 1
        state.commit()

    Each rank makes the same; what it is made with is what the job begins with, and rank 0's counts.

    Args:
        layers: built ones, with gamma, beta, moving statistics and grids.
        values: arrays, numbers, bool, str or bytes, by name. What is none of these, such as a torch model's state, can
            be made bytes of when it is saved.

    Raises:
        ValueError: a layer is not built, or a name is taken.
        TypeError: a value can't travel.
    """

    def __init__(self, *, layers: Iterable[BatchNormalization] = (), **values: Any) -> None:
        self._layers = tuple(layers)
        self._names = tuple(values)
        self._world: World | None = None
        self._saves = 0
        for name, value in values.items():
            if hasattr(self, name) or name.startswith("_"):
                raise ValueError(f"State({name}=): this name is taken; expected another one.")
            setattr(self, name, value)
        self._kept = self._packed()

    def __getattr__(self, name: str) -> Any:
        """Only for type checkers: values are attributes, whatever their names."""
        raise AttributeError(f"this state has no value {name!r}: it has {', '.join(self.__dict__.get('_names', ()))}")

    @property
    def saves(self) -> int:
        """How often it was saved, on whichever rank; 0: never yet."""
        return self._saves

    def save(self) -> None:
        """Keep what it is now, in this process's memory: the ranks go on from there when one is lost.

        All ranks call it after the same step. It copies, and exchanges nothing.

        Raises:
            TypeError: a value can't travel.
        """
        self._kept = self._packed()
        self._saves += 1

    def commit(self) -> None:
        """Save, and let ranks in that wait to join; every rank calls it.

        Raises:
            TypeError: a value can't travel.
            RegroupError: ranks join, or one was lost: the loop over `elastic` goes on with the next generation.
            CollectiveError: the ranks disagree.
            RuntimeError: this is not within a generation.
        """
        self.save()
        if self._world is None:
            raise RuntimeError("State.commit(): expected to be within `with generation as world:`; save() is not.")
        self._world.admit()

    def packed(self) -> list[NDArray[Any]]:
        """What was saved last; before that, what it was made with."""
        return self._kept

    def take(self, world: World, saves: int, arrays: list[NDArray[Any]]) -> None:
        """Go on from what a rank had packed, as every rank of the world does.

        Raises:
            MismatchError: on every rank: its values have other names, or its layers other shapes.
            CollectiveError: another rank is lost, or disagrees.
        """
        header, *rest = arrays
        root, mine = json.loads(header.tobytes()), self._header()
        differ = float(any(root[key] != mine[key] for key in ("names", "layers")))
        (marks,) = world.allreduce([np.array([differ * (world.rank == rank) for rank in range(world.world_size)])])
        if marks.any():
            ranks = tuple(np.flatnonzero(marks).tolist())
            raise MismatchError(
                f"The ranks made different states: {', '.join(f'rank {rank}' for rank in ranks)} made another one than "
                f"{json.dumps({key: root[key] for key in ('names', 'layers')})}. Make the same State on every rank.",
                ranks=ranks,
            )
        self._world, self._saves = world, saves
        for name, kind in zip(self._names, root["kinds"], strict=True):
            setattr(self, name, _unpacked(kind, rest.pop(0)))
        for layer in self._layers:
            layer.forget_calls()  # of the step that was cut short
            rest = taken(layer, rest)
            if layer.synchronized:
                layer.reseed()
        self._kept = self._packed()

    def _packed(self) -> list[NDArray[Any]]:
        header = np.frombuffer(json.dumps(self._header()).encode(), np.uint8)
        values = [_packed(name, getattr(self, name)) for name in self._names]
        return [header, *values, *(array.copy() for layer in self._layers for array in contents(layer))]

    def _header(self) -> dict[str, Any]:
        kinds = [_kind(name, getattr(self, name)) for name in self._names]
        return {"names": list(self._names), "kinds": kinds, "layers": [described(layer) for layer in self._layers]}


class Generation:
    """The ranks of an elastic job from one change to the next.

    Attributes:
        world: they.
        number: of the generation; those of one job ascend.
        change: what ended it for this rank, once its block is left; None: all of them finished, or an error did.
    """

    def __init__(self, job: ElasticJob, world: World, number: int) -> None:
        self._job = job
        self.world = world
        self.number = number
        self.change: RegroupError | None = None

    def __enter__(self) -> World:
        return self.world

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Leave; a `RegroupError` ends here, and the loop goes on, and a `JobFinishedError`, and the loop ends."""
        finished = False
        if error is None:
            try:
                self.world.admit()  # all finish together, and whoever comes now gets the result
                finished = True
            except RegroupError as change:
                error = change
        finished = finished or isinstance(
            error, JobFinishedError
        )  # this rank was given up, and the others go without it
        self.change = error if isinstance(error, RegroupError) else None
        self._job.leave(self.world, error, finished=finished)
        return isinstance(error, RegroupError | JobFinishedError)


class ElasticJob(Iterator[Generation]):
    """The generations of an elastic job in which this process takes part: see `elastic`."""

    def __init__(self, state: Recoverable, limits: Limits, timeout: float, **given: str | None) -> None:
        self._state = state
        self._limits = limits
        self._timeout = timeout
        self._given = given
        self._placement: Placement | None = None
        self._inside = False
        self._finished = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Generation:
        if self._inside:
            raise RuntimeError("elastic(): expected `with generation as world:` around the body of the loop.")
        while not self._finished:
            try:
                world, self._placement = join_elastic(
                    self._limits, self._placement, timeout=self._timeout, **self._given
                )
            except JobFinishedError as error:
                logger.warning("%s", error)
                break
            except RegroupError as error:  # the ranks changed while this one came back
                logger.warning("%s", error)
                continue
            try:
                self._recall(world)
            except RegroupError as error:
                self.leave(world, error, finished=False)
                continue
            except BaseException as error:
                self.leave(world, error, finished=False)
                raise
            self._inside = True
            return Generation(self, world, self._placement.generation)
        raise StopIteration

    def leave(self, world: World, error: BaseException | None, *, finished: bool) -> None:
        """Leave a generation's world, for good or to join the next one."""
        world.__exit__(None if error is None else type(error), error, None)
        self._inside = False
        self._finished = finished
        if isinstance(error, RegroupError | JobFinishedError):
            logger.warning("%s", error)
            failure_marker.recovered()

    def _recall(self, world: World) -> None:
        """Give every rank the state that was saved last."""
        saves = np.zeros(world.world_size, np.int64)
        saves[world.rank] = self._state.saves
        (saves,) = world.allreduce([saves], op="max")
        root = int(saves.argmax())
        arrays = world.broadcast(self._state.packed() if world.rank == root else None, root=root)
        self._state.take(world, int(saves[root]), arrays)
        logger.info(
            "rank %d of %d in generation %d: goes on from what rank %d had saved (number %d)",
            world.rank,
            world.world_size,
            self._placement.generation if self._placement is not None else 0,
            root,
            saves[root],
        )


def elastic(
    state: Recoverable,
    *,
    min: int | None = None,  # noqa: A002 - what every tool of the field calls it
    max: int | None = None,  # noqa: A002 - likewise
    address: str | None = None,
    job: str | None = None,
    token: str | None = None,
    timeout: float = 300,
) -> ElasticJob:
    """Take part in a job whose ranks may change while it runs: over the statistics service, or over MPI.

    Over MPI it works under Open MPI's `mpirun --with-ft ulfm`. Ranks that are left go on there, and none joins.

        for generation in bnworker.elastic(state, min=2, max=8):
            with generation as world:
                ...

    The loop makes one pass for each generation, the ranks from one change to the next. When a rank is lost, the
    exchange in which the others are raises a `RegroupError`: the `with` block takes it, and the next pass begins, with
    `state` as it was saved last, on every rank, and with a world of those that are left. Ranks that join are let in
    where the others call `state.commit()`. A pass whose block ends without an error is the last one.

    Args:
        state: what the ranks go on from, the same on every rank: a `State`.
        min, max: how many ranks the job may have: fewer wait for others, for as long as `timeout` says, and more wait
            for a place. None: as the launcher says (`bnlayer launch --elastic MIN:MAX`).
        address, job, token: as of `join`.
        timeout: seconds that joining, waiting for a place included, and each exchange may take.

    Returns:
        The generations.

    Raises:
        ValueError: the limits are missing or out of range, or the job would use neither a service that outlives its
            ranks nor an MPI that lets them survive each other.
        CollectiveError: in the loop: too few ranks are left, the ranks disagree, or the service refuses.
    """
    return ElasticJob(state, _limits(min, max), timeout, address=address, job=job, token=token)


def _limits(least: int | None, most: int | None) -> Limits:
    value = variable(os.environ, limits.VARIABLE)
    if (least is None or most is None) and value is None:
        raise ValueError(
            "elastic(): expected min= and max=, or a launcher that says them (bnlayer launch --elastic MIN:MAX)."
        )
    try:
        default = Limits(least or 1, most or 1) if value is None else Limits.parsed(value)
    except ValueError as error:
        raise ValueError(f"{limits.VARIABLE if value is not None else 'elastic(min=, max=)'}: {error}.") from None
    try:
        return Limits(default.minimum if least is None else least, default.maximum if most is None else most)
    except ValueError as error:
        raise ValueError(f"elastic(min=, max=): {error}.") from None


def _kind(name: str, value: object) -> str:
    if isinstance(value, np.ndarray):
        return "array"
    kind = next((kind for kind, type_ in _KINDS.items() if isinstance(value, type_)), None)
    if kind is None:
        raise TypeError(
            f"State: {name} is a {type(value).__name__}; expected an array, a number, bool, str or bytes. Make bytes "
            "of it before it is saved, and read them where a generation begins."
        )
    return kind


def _packed(name: str, value: Any) -> NDArray[Any]:
    match _kind(name, value):
        case "array":
            return np.array(value)
        case "str":
            return np.frombuffer(value.encode(), np.uint8)
        case "bytes":
            return np.frombuffer(value, np.uint8)
        case "float":
            return np.array(value, np.float64)
        case "int":
            return np.array(value, np.int64)
        case _:
            return np.array(value, np.bool_)


def _unpacked(kind: str, array: NDArray[Any]) -> Any:
    match kind:
        case "array":
            return array
        case "str":
            return array.tobytes().decode()
        case "bytes":
            return array.tobytes()
        case _:
            return _KINDS[kind](array.item())
