"""`World`: this process as one of the ranks of a job.

Laws:
1. User input is checked here, before anything is sent; a transport gets what it can reduce.
2. The other ranks are notified of an exception that leaves the `with` block.
3. A process that was forked from a rank can't leave or fail in its place.

What holds for each exchange is in `exchanges.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer import BatchNormalization
from bnlayer.collective import ADMIT, SYNCHRONIZE, Call, Operation, PlainSignature, Total
from bnlayer.reduction import OPS
from bnlayer.state import LayerState
from bnworker import failure_marker
from bnworker.arrays import reducible, size
from bnworker.checkpointing import CheckpointError, KeepsCheckpoints
from bnworker.checkpointing import checked as checked_checkpoint
from bnworker.exchanges import Exchanges
from bnworker.presence import Presence, failure
from bnworker.statistics import Statistics
from bnworker.synchronizing import checked, contents, described, taken, warn_of_replacement
from bnworker.transports import Transport

_limbs_size: Callable[[Total], int] = operator.attrgetter("limbs.nbytes")


class Layer(Protocol):
    """The part of a layer that `pull` and `push` use; `BatchNormalization` has it."""

    @property
    def name(self) -> str:
        """Its name within the job."""

    @property
    def state(self) -> LayerState:
        """Its moving statistics and grids."""

    def follow(self, state: LayerState) -> None:
        """Replace them by the owner's."""


class World:
    """The ranks of a job, as one of them sees them.

    Every rank must make the same calls in the same order. One that can't be completed raises a
    `CollectiveError` on every rank that is alive, with the same text; the world is then over.

        with bnworker.join() as world:
            gradients = world.allreduce(gradients)

    Args:
        transport: this rank's end of the exchanges.
        install: whether to become the process's current collective and to leave when the process ends. Without
            it one process can have several worlds, for tests.
        joined: with `install`: whether it becomes the current collective; otherwise it only leaves when the process
            ends.

    Raises:
        RuntimeError: the process has a joined world already.

    Attributes:
        statistics: what was exchanged so far.
    """

    def __init__(self, transport: Transport, *, install: bool = True, joined: bool = True) -> None:
        self.statistics = Statistics()
        self._transport = transport
        self._exchanges = Exchanges(self, transport, self.statistics)
        self._joined = install and joined
        self._presence = Presence(self, self._depart, joined=joined) if install else None
        if self._joined:
            failure_marker.opened("world")

    # ---- rank and size ----

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        return self._transport.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._transport.world_size

    @property
    def transport(self) -> str:
        """How the ranks reach each other: "alone", "mpi", "service" or "torch"."""
        return self._transport.name

    def shard(self, n: int) -> slice:
        """This rank's part of n rows: contiguous, and as even as can be.

            n = q·W + m:        ranks 0 to m − 1 hold q + 1 rows, the others q

        Args:
            n: the number of rows, at least 0.

        Returns:
            The slice; over all ranks they cover 0 … n − 1 in order, once.

        Raises:
            TypeError: n is no integer.
            ValueError: n is negative.
        """
        n = operator.index(n)
        if n < 0:
            raise ValueError(f"shard(n): expected n >= 0, received {n}.")
        each, more = divmod(n, self.world_size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    # ---- plain operations ----

    def allreduce(self, arrays: Iterable[ArrayLike], op: Literal["sum", "max", "min"] = "sum") -> list[NDArray[Any]]:
        """Reduce arrays element by element over all ranks.

        Floats are added in float64 and rounded once; integers exactly. NaN and Inf pass through a sum, and a
        NaN anywhere is the maximum and the minimum. The service adds floats in rank order, and so does MPI
        after `join(deterministic=True)`: the same bits for the same ranks.

        Args:
            arrays: of float16, bfloat16, float32, float64, integers, or (for max and min) bool. Every rank
                gives the same number, dtypes and shapes. Numbers count as arrays without axes.
            op: "sum", "max" or "min".

        Returns:
            New arrays of the dtypes and shapes that came in, the same on every rank.

        Raises:
            TypeError: an array's dtype can't be reduced, or `arrays` is not a list of arrays.
            ValueError: op is another.
            OverflowError: on every rank: a sum of integers does not fit its dtype.
            CollectiveError: the ranks disagree, or one is lost.
        """
        if op not in OPS:
            raise ValueError(f"allreduce(op=): expected one of {', '.join(OPS)}, received {op!r}.")
        checked = reducible("allreduce", arrays, op)
        described = tuple(f"{array.dtype.name}{list(array.shape)}" for array in checked)
        signature = PlainSignature(op, described)
        return self._exchanges.plain(
            Operation.REDUCE, signature, size(checked), lambda call: self._transport.reduce(call, checked), size
        )

    def broadcast(self, arrays: Iterable[ArrayLike] | None = None, root: int = 0) -> list[NDArray[Any]]:
        """Give every rank the root's arrays.

        Args:
            arrays: the root's; what other ranks give is not looked at. Dtypes and shapes travel along.
            root: the rank that has the arrays.

        Returns:
            New arrays, the same on every rank.

        Raises:
            TypeError: on the root: an array's dtype can't travel, or `arrays` is not a list of arrays.
            ValueError: root is no rank.
            CollectiveError: the ranks disagree, or one is lost.
        """
        root = operator.index(root)
        if not 0 <= root < self.world_size:
            raise ValueError(f"broadcast(root=): expected 0 <= root < {self.world_size}, received {root}.")
        mine = None
        if root == self.rank:
            mine = [array.copy() for array in reducible("broadcast", () if arrays is None else arrays, "max")]
        signature = PlainSignature(root=root)
        return self._exchanges.plain(
            Operation.BROADCAST, signature, size(mine or ()), lambda call: self._transport.broadcast(call, mine), size
        )

    def barrier(self) -> None:
        """Return when every rank has called it.

        Raises:
            CollectiveError: the ranks disagree, or one is lost.
        """
        self._exchanges.plain(Operation.BARRIER, PlainSignature(), 0, self._transport.barrier, lambda _: 0)

    # ---- called by layers ----

    def enroll(self, call: Call, state: LayerState) -> LayerState:
        """Enroll a layer with all ranks; a layer calls it. Returns the owner's state."""
        seeded, known = self._exchanges.run(
            partial(
                self._exchanges.counted,
                call,
                size(state.arrays().values()),
                partial(self._transport.enroll, call, state),
                lambda answer: size(answer.state.arrays().values()),
            )
        )
        if seeded.fingerprint != state.fingerprint:
            warn_of_replacement(str(call.key.layer), seeded, known=known)
        return seeded

    def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
        """Reduce exact limbs over all ranks; a layer calls it, with the state that it set since the last time."""
        sent = limbs.nbytes if state is None else limbs.nbytes + size(state.arrays().values())
        action = partial(self._transport.exchange, call, limbs, state)
        return self._exchanges.run(partial(self._exchanges.counted, call, sent, action, _limbs_size))

    def admit(self) -> None:
        """Return when every rank has called it; in an elastic job, let ranks in that wait to join.

        A barrier, that is, which raises a `RegroupError` on every rank where some wait and there is a place: all then
        join the next generation. `State.commit` calls it.

        Raises:
            CollectiveError: the ranks disagree, one is lost, or they regroup.
        """
        signature = PlainSignature(ADMIT)
        self._exchanges.plain(Operation.BARRIER, signature, 0, self._transport.barrier, lambda _: 0)

    def pull(self, layer: Layer | str) -> LayerState | None:
        """Fetch the owner's moving statistics of a layer, and put them into it.

        Any rank may call it at any time; inference never does. Under "alone" and "mpi" each rank owns its
        own, and nothing happens. Under "service" it discards what was set on this rank since the layer's last exchange.

        Args:
            layer: the layer; or its name, and nothing is put anywhere.

        Returns:
            What was fetched; None where each rank owns its own.

        Raises:
            ValueError: the layer is not built.
            CollectiveError: the service refuses, or can't be reached.
        """
        self._exchanges.check()
        name = layer if isinstance(layer, str) else layer.name
        state = self._exchanges.run(lambda: self._transport.pull(name))
        if state is not None and not isinstance(layer, str):
            layer.follow(state)
        return state

    def push(self, layer: Layer) -> None:
        """Make a layer's moving statistics the owner's, e.g. after loading weights.

        Under "service" any rank may call it, and the last one wins; the others `pull`. Under "mpi" each rank
        owns its own: all must push the same, or the next exchange is a `MismatchError`.

        Raises:
            ValueError: the layer is not built, or its statistics are not finite.
            CollectiveError: the service refuses, or can't be reached.
        """
        self._exchanges.check()
        state = layer.state
        state.refuse_nonfinite(layer.name)
        taken = self._exchanges.run(lambda: self._transport.push(layer.name, state))
        if taken is not None:
            layer.follow(taken)

    def synchronize(self, layers: Iterable[BatchNormalization]) -> None:
        """Give every rank, and the owner, rank 0's gamma, beta, moving statistics and grids; every rank calls it.

            if world.rank == 0:
                interchange.load_into("best.npz", model)
            world.synchronize(model.values())

        Args:
            layers: built; the same ones, in the same order, on every rank. Those that are not `synchronized` are taken
                along.

        Raises:
            TypeError: `layers` is not a list of layers.
            ValueError: a layer is not built, or belongs to another world.
            CollectiveError: the ranks disagree, in their layers for example, or one is lost.
        """
        chosen = checked(layers, self)
        signature = PlainSignature(SYNCHRONIZE, tuple(map(described, chosen)), root=0)
        mine = [array for layer in chosen for array in contents(layer)] if self.rank == 0 else None
        values = self._exchanges.plain(
            Operation.BROADCAST, signature, size(mine or ()), lambda call: self._transport.broadcast(call, mine), size
        )
        for layer in chosen:
            values = taken(layer, values)
            if layer.synchronized:
                layer.reseed()

    def checkpoint(self, name: str, *, step: int) -> None:
        """Have the service keep the moving statistics and grids of all layers, as they are now; every rank calls it.

            world.checkpoint("epoch-3", step=optimizer_steps)

        It is on the service's disk when this returns, in one piece; one of the same name is replaced. `bnlayer state
        checkpoints JOB` lists what there is, and `bnlayer state restore JOB NAME` goes back to one.

        Args:
            name: letters, digits, dots, dashes and underscores.
            step: the training step that it belongs to, 0 or more.

        Raises:
            TypeError, ValueError: the name or the step can't be used.
            RuntimeError: the world has no service.
            CheckpointError: on every rank: it is not kept. The world goes on.
            CollectiveError: the ranks disagree, or one is lost.
        """
        signature = checked_checkpoint(name, step)
        transport = self._transport
        if not isinstance(transport, KeepsCheckpoints):
            raise RuntimeError(
                f"checkpoint({name!r}): the service keeps checkpoints, and this world has none: its ranks reach each "
                f"other by {self.transport!r}. Save the layers with bnlayer.interchange.save."
            )
        refused = self._exchanges.plain(Operation.BARRIER, signature, 0, transport.checkpoint, lambda _: 0)
        if refused:
            raise CheckpointError(refused)

    # ---- the end ----

    def leave(self) -> None:
        """Leave the job cleanly. `with` does it, and so does a normal exit; a second time does nothing."""
        self._depart("")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depart(failure(error))

    def __repr__(self) -> str:
        left, error = ", left" if self._exchanges.left else "", self._exchanges.error
        ended = left if error is None else f", ended by {type(error).__name__}"
        return f"World(rank={self.rank}, world_size={self.world_size}, transport={self.transport!r}{ended})"

    def _depart(self, reason: str) -> None:
        if self._exchanges.left:
            return
        self._exchanges.left = True
        if self._presence is not None:
            self._presence.end()
        if self._exchanges.is_forked:
            return
        self._transport.leave(reason)
        if self._joined:
            failure_marker.closed("world")
