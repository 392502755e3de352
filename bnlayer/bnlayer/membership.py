"""`Member`: the part of a layer that other ranks share: its state, its enrolment, and what was set by hand.

Setting moving statistics (`assign`, `set_weights`, `restore`) must be done alike on all ranks, as a call must. A layer
records what was set since its last exchange, and sends it with the next one: see `exchange_driver.Changes`. What is not
finite is refused then, before anything is sent and whatever the ranks exchange through: no batch could mend it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from operator import is_
from typing import Any

from numpy.typing import NDArray

from bnlayer.base import Waiting
from bnlayer.collective import Alone, Collective, LayerSignature, current, hand_over, is_current
from bnlayer.definition import Definition
from bnlayer.exchange_driver import Changes, ExchangeDriver
from bnlayer.fingerprint import fingerprint
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moments import Moments
from bnlayer.moving import Moving
from bnlayer.state import LayerState
from bnlayer.variable import Variable

# A thread that looks at a layer's state, while another one trains, sees it as it is between two calls; otherwise half a
# call would look as if a variable had been assigned to. One lock for all layers: it is held for a microsecond.
STATE_LOCK = threading.RLock()
os.register_at_fork(before=STATE_LOCK.acquire, after_in_parent=STATE_LOCK.release, after_in_child=STATE_LOCK.release)


def _held(variables: list[Variable]) -> list[NDArray[Any] | None]:
    """What variables hold at one moment; None of a subclass's, whose code must not run while others wait."""
    with STATE_LOCK:
        return [v._value if type(v) is Variable else None for v in variables]  # noqa: SLF001


class _Snapshot:
    """What the moving variables held when a copy was begun: another thread may train the layer before it is made.

    Attributes:
        values: as `_held` gives them.
        detached: whether this is a copy itself; not so where `copy.copy` shares the variables with the layer.
    """

    def __init__(self, values: list[NDArray[Any] | None], detached: bool = False) -> None:
        self.values, self.detached = values, detached

    def __reduce__(self) -> tuple[Any, ...]:
        return _Snapshot, (self.values, True)


class Member(Definition):
    """The part of a layer that is shared with other ranks; `layer.py` has the computation."""

    _kept: LayerState | None = None
    _signature_cache: LayerSignature | None = None
    _driver: ExchangeDriver | None = None
    _state_set = False
    _observer: Callable[[Moments], None] | None = None  # of each training call's exact moments
    unbiased = False  # whether the moving variance is N/(N − 1) times the biased one, as in torch; a setting of the run

    # State that is shared with the ranks

    @property
    def state(self) -> LayerState:
        """The moving statistics and grids, as their owner keeps them.

        Raises:
            ValueError: the layer is not built yet.
        """
        self._must_be_built()
        state = self._kept
        if state is None:
            state = self._kept = self._without_grids()
        elif not self._holds(state.moving):
            # A variable was assigned to; or all are others, because the layer was built anew.
            new = self._without_grids()
            grids = state if state.kind == new.kind else new
            state = self._kept = LayerState(new.moving, grids.forward, grids.backward, state.version)
            self._state_set = True
        return state

    def _without_grids(self) -> LayerState:
        channels, arithmetic = self.moving_mean.shape[0], self.dtype_policy.arithmetic
        grids = Grid.unknown(arithmetic, channels), BackwardGrid.unknown(arithmetic, channels)
        return LayerState(Moving(*(variable.value for variable in self._moving)), *grids)

    def _holds(self, moving: Moving) -> bool:
        """Whether these are the arrays that the variables hold."""
        if moving.stddev is None:  # nearly always, and at every call
            return self.moving_mean.value is moving.mean and self.moving_variance.value is moving.variance
        return all(map(is_, [variable.value for variable in self._moving], moving.values))

    def restore(self, state: LayerState) -> None:
        """Take over moving statistics and grids. As with a training call, every rank must do it, with the same values.

        Raises:
            ValueError: the layer is not built yet, or the state belongs to another number of channels or dtype.
        """
        self.follow(state)
        self._state_set = True

    def follow(self, state: LayerState) -> None:
        """Take over the owner's state, in place of everything that was set here.

        Raises:
            ValueError: as `restore`.
        """
        self._must_be_built()
        if state.kind != self.state.kind:
            raise ValueError(f"Layer {self.name!r}: expected a state of {self.state.kind}, received {state.kind}.")
        with STATE_LOCK:
            for variable, vector in zip(self._moving, state.moving.values, strict=True):
                variable.assign(vector)
            self._kept = replace(state, moving=Moving(*(variable.value for variable in self._moving)))
            self._state_set = False

    def reseed(self) -> None:
        """Give rank 0's moving statistics and grids to all ranks and the owner; every rank calls it.

        Raises:
            ValueError: the layer is not built yet.
            CollectiveError: the ranks disagree, or one is lost.
        """
        self._must_be_built()
        collective = self._in_force()
        driver = self._driver
        if driver is None or driver.collective is not collective:
            driver = ExchangeDriver(collective, self.name)
        self._enroll(driver, anew=True)

    def _changes(self, state: LayerState) -> Changes | None:
        """What was set by hand since the last exchange, up to this state; None, as at almost every step, if nothing.

        Raises:
            ValueError: moving statistics that all ranks share were set to NaN or infinity.
        """
        if not (self._state_set or self._weights_set):
            return None
        if self._state_set and self.synchronized:
            state.refuse_nonfinite(self.name)
        return Changes(state if self._state_set else None, self._weights() if self._weights_set else 0)

    def _changes_announced(self) -> None:
        """Record that an exchange carried the changes, and that they were the same on all ranks."""
        if self._state_set or self._weights_set:
            self._state_set = self._weights_set = False

    def _weights(self) -> int:
        """Fingerprint of gamma and beta; 0 where each rank has its own."""
        if self.own_weights:
            return 0
        return fingerprint({variable.name: variable.value for variable in self._variables if variable.trainable})

    # The ranks

    def _joined(self) -> ExchangeDriver:
        """The driver for the current collective; with a new collective the layer enrolls first."""
        if not self.synchronized:
            self._driver = self._driver or ExchangeDriver(Alone(), self.name)
            return self._driver
        if self._driver is not None and self.collective is None and is_current(self._driver.collective):
            return self._driver
        collective = self._in_force()
        if self._driver is None or self._driver.collective is not collective:
            if self._driver is not None and self._driver.collective.world_size > 1 and isinstance(collective, Alone):
                raise RuntimeError(
                    f"Layer {self.name!r} belonged to a world of {self._driver.collective.world_size} ranks, which was "
                    "left: training on would be silently unsynchronized. Train inside `with bnworker.join()`, or make "
                    "a new layer for one process."
                )
            return self._enroll(ExchangeDriver(collective, self.name))
        return self._driver

    def _replaced(self) -> None:
        """Another layer goes by this one's name from now on."""
        if self._driver is not None:
            hand_over(self._driver.collective, self.name, self)

    def _in_force(self) -> Collective:
        return self.collective if self.collective is not None else current()

    def _enroll(self, driver: ExchangeDriver, *, anew: bool = False) -> ExchangeDriver:
        state = self.state
        state.refuse_nonfinite(self.name)
        self.follow(driver.enroll(self, self._signature(), state, self._weights(), anew=anew))
        self._weights_set = False
        self._driver = driver
        return driver

    def _signature(self) -> LayerSignature:
        """The part of this layer's signature that is the same for every call."""
        signature, policy, channels = self._signature_cache, self.dtype_policy.name, self.moving_mean.shape[0]
        own = (channels, self.momentum, self.epsilon, self._renorm, self.own_weights, self.unbiased, policy)
        if signature is None or own != (
            signature.channels, signature.momentum, signature.epsilon, signature.renorm, signature.own_weights,
            signature.unbiased, signature.policy,
        ):  # fmt: skip
            signature = self._signature_cache = LayerSignature(
                channels=channels,
                dtype=self.dtype_policy.arithmetic,
                momentum=self.momentum,
                epsilon=self.epsilon,
                policy=policy,
                renorm=self._renorm,
                unbiased=self.unbiased,
                own_weights=self.own_weights,
            )
        return signature

    def get_weights(self) -> list[NDArray[Any]]:
        """Copies of all values, in the order of `weights`; the moving ones of one call, also while a thread trains."""
        variables = self._variables
        values = _held(variables)
        return [v.numpy() if value is None else value.copy() for v, value in zip(variables, values, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: no collective, and no batch that waits for its backward pass."""
        with STATE_LOCK:
            own, moving = self.__dict__.copy(), _held(self._moving)
        absent = {"collective": None, "_driver": None, "_waiting": Waiting(), "_observer": None}
        return {**own, **absent, "_snapshot": _Snapshot(moving)}

    def __setstate__(self, given: dict[str, Any] | tuple[dict[str, Any] | None, dict[str, Any] | None]) -> None:
        """Hold what the layer held when the copy was begun."""
        own, slots = given if isinstance(given, tuple) else (given, None)  # a subclass may have slots
        self.__dict__.update((sys.intern(name), value) for name, value in (own or {}).items())
        for name, value in (slots or {}).items():
            setattr(self, name, value)
        snapshot = self.__dict__.pop("_snapshot", None)
        if snapshot is not None and snapshot.detached:
            for variable, value in zip(self._moving, snapshot.values, strict=False):  # in a cycle not all are there yet
                if value is not None:
                    variable.take(value)

    def _must_be_built(self) -> None:
        if not self.built:
            raise ValueError(f"Layer {self.name!r} has no state yet: call it once, or build(input_shape).")

    def _must_fit(self, state: LayerState, channels: int, arithmetic: str) -> None:
        if channels != state.channels or arithmetic != state.forward.dtype:
            raise RuntimeError(
                f"Layer {self.name!r}: this call is of {channels} channels in {arithmetic}, and the layer's state of "
                f"{state.channels} in {state.forward.dtype}. Pull calls back before a layer is built anew, and build "
                "it anew after its dtype policy was set to one with another arithmetic."
            )
