"""A layer's training calls in a world of one, which has nothing to agree on: one crossing into the kernels each way.

Between two calls of a layer the rest of the network goes through the caches, and Python's own code and objects leave
them: each line of them that is fetched anew costs as much as a hundred operations. So what does not change from one
call to the next is looked up once, and holds until an attribute of the layer is set; the state is brought up to date
when somebody looks at it.

An exchange with nobody has the same bits, and takes what is refused here.

Shape suffixes: A axes before the channels, C channels, B axes after them.
"""

# ruff: noqa: SLF001 - a variable's property is a function of Python's: six of them are a tenth of what a call takes

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.collective import LayerSignature
from bnlayer.exchange_driver import ExchangeDriver
from bnlayer.kernels import Kernels
from bnlayer.kernels.results import CallSettings, Record
from bnlayer.membership import STATE_LOCK, Member
from bnlayer.moving import Moving
from bnlayer.pullback import SavedTraining
from bnlayer.state import LayerState
from bnlayer.tiling import passes
from bnlayer.variable import Variable
from bnlayer.view import View, flat_shape

# Of the layer's own, in its `__dict__`: an attribute of a subclass's, a property say, may change unseen.
_SETTINGS = frozenset(("momentum", "epsilon", "trainable", "synchronized", "collective", "axis", "dtype_policy"))

Gradients = tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]  # of the input, gamma and beta


@dataclass(eq=False, slots=True)
class _Prepared:
    """What a call looks up for the next ones, and how far they have come.

    Attributes:
        driver: of the world of one.
        signature: of the layer.
        kernels: of the process.
        call: what the kernels take of the settings.
        dtype: of the batches.
        axis: of their channels, from the front.
        before: the layer's state before these calls.
        mean, variance: the moving statistics after them, (C,).
        calls: how many of them there were.
        known: how many of these the layer's state knows of.
        shape, flat: of the latest batch, and as (A, C, B).
        fits: whether that batch fitted the grid.
    """

    driver: ExchangeDriver
    signature: LayerSignature
    kernels: Kernels
    call: CallSettings
    dtype: np.dtype[Any]
    axis: int
    before: LayerState
    mean: NDArray[Any]
    variance: NDArray[Any]
    calls: int = 0
    known: int = 0
    shape: tuple[int, ...] = ()
    flat: tuple[int, int, int] = (0, 0, 0)
    fits: bool = True


@dataclass(eq=False, slots=True)
class SavedAlone:
    """What such a call saves.

    Attributes:
        prepared: what it went by.
        step: its number, among the training calls of the driver.
        x: (A, C, B), the batch, in the caller's memory.
        shape: of the output.
        seen: a sample of the batch, taken at the call.
        record: the memory of its `Record`.
    """

    prepared: _Prepared
    step: int
    x: NDArray[Any]
    shape: tuple[int, ...]
    seen: bytes
    record: NDArray[np.uint8]

    @property
    def view(self) -> View:
        """The batch."""
        return View(self.x, None, self.shape)

    def general(self, view: View) -> SavedTraining:
        """The same as any training call of that batch saves it."""
        prepared, record = self.prepared, Record(self.record)
        return SavedTraining(prepared.driver, prepared.signature, self.step, view, self.seen, record, None, None, None)


class MemberAlone(Member):
    """The part of a layer that makes the calls which nobody else takes part in."""

    _prepared: _Prepared | None = None

    @property
    def state(self) -> LayerState:
        """The moving statistics and grids, as their owner keeps them.

        Another thread may look at them, or set attributes, while one trains: it sees them as between two calls.

        Raises:
            ValueError: the layer is not built yet.
        """
        with STATE_LOCK:
            self.catch_up()
            return super().state

    def catch_up(self) -> None:
        """Make the calls known to the state."""
        with STATE_LOCK:
            if self._prepared is not None:
                self._commit(self._prepared)

    def _commit(self, prepared: _Prepared) -> None:
        # A signal's handler that looks at the state in the middle of this does all of it, and this does the same again.
        if prepared.calls != prepared.known:
            calls = prepared.calls
            after = prepared.before.moved_to(Moving(prepared.mean, prepared.variance), calls)
            object.__setattr__(self, "_kept", after)
            prepared.known = calls

    def _drop_prepared(self) -> None:
        with STATE_LOCK:
            if self._prepared is not None:
                self.catch_up()
                self.__dict__["_prepared"] = None

    def _take(self, after: LayerState) -> None:
        """Hold a state, and let the variables hold its vectors; nothing that was looked up before goes on from it."""
        moving, own = after.moving, self.__dict__
        mean, variance = self.moving_mean, self.moving_variance
        with STATE_LOCK:
            own["_prepared"] = None
            # Nothing is called in the lines that set values, so no signal's handler can see half of them.
            if moving.stddev is None and type(mean) is type(variance) is Variable:
                own["_kept"], mean._value, variance._value = after, moving.mean, moving.variance
            elif moving.stddev is not None and all(type(variable) is Variable for variable in self._moving):
                values, (a, b, c, d, e) = moving.values, self._moving
                own["_kept"], (a._value, b._value, c._value, d._value, e._value) = after, values
            else:
                own["_kept"] = after
                for variable, value in zip(self._moving, moving.values, strict=True):
                    variable.take(value)

    if not TYPE_CHECKING:  # it would let a name that is misspelt pass

        def __setattr__(self, name: str, value: Any) -> None:
            """Nothing that was looked up holds any longer."""
            changes = self.__dict__.get(name) is not value
            if changes:
                self._drop_prepared()
            object.__setattr__(self, name, value)  # a subclass's property, say, which may wait for another thread
            if changes:
                self._drop_prepared()  # another thread may have looked the old value up meanwhile

        def __delattr__(self, name: str) -> None:
            """As when it is set."""
            self._drop_prepared()
            object.__delattr__(self, name)
            self._drop_prepared()

    @property
    def _is_plain(self) -> bool:
        """Whether settings are what was last set, and variables give and take what they hold: in no subclass's way."""
        variables = self.gamma, self.beta, self.moving_mean, self.moving_variance
        own = self.__dict__.keys() >= _SETTINGS and not any(hasattr(type(self), name) for name in _SETTINGS)
        own = own and type(self).compute_dtype is MemberAlone.compute_dtype
        return own and all(v is None or type(v) is Variable for v in variables)

    def _has_single_gradients(self) -> bool:
        """Whether the gradients of gamma and beta are float32, as one crossing gives them."""
        return all(v is None or v.dtype == np.float32 for v in (self.gamma, self.beta))

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: the state, without what was looked up."""
        with STATE_LOCK:
            self.catch_up()
            return {**super().__getstate__(), "_prepared": None}

    def _prepare(self, driver: ExchangeDriver, view: View, state: LayerState) -> _Prepared | None:
        """What a call like that of a batch goes by, from a state on; None: it goes by an exchange."""
        with STATE_LOCK:
            return self._look_up(driver, view, state)

    def _look_up(self, driver: ExchangeDriver, view: View, state: LayerState) -> _Prepared | None:
        policy = self.dtype_policy
        if not driver.alone or view.passes or view.mask is not None or view.x.dtype != policy.compute_dtype:
            return None
        if not self.trainable or self._renorm is not None or self._observer is not None or not self._is_plain:
            return None
        prepared, kernels = self._prepared, passes().kernels
        if prepared is not None:
            if not prepared.fits:
                return None
            same = prepared.kernels is kernels and prepared.driver is driver
            if same and prepared.call.unbiased is self.unbiased:
                return prepared
        if not kernels.has_calls_alone(policy.arithmetic_dtype, policy.variable_dtype):
            return None
        self.__dict__["_prepared"] = prepared = _Prepared(
            driver,
            self._signature(),
            kernels,
            CallSettings(self.epsilon, self.momentum, self.synchronized, self.unbiased),
            policy.compute_dtype,
            self.axis % self.ndim,
            state,
            state.moving.mean,
            state.moving.variance,
        )
        return prepared

    def _train_again(self, inputs: ArrayLike, update_moving: bool) -> tuple[NDArray[Any], SavedAlone] | None:
        """A training call like the one before; None: it is not, or the grid does not fit, and nothing has happened."""
        prepared = self._prepared
        if (
            prepared is None
            or type(inputs) is not np.ndarray
            or inputs.dtype is not prepared.dtype
            or self.moving_mean._value is not prepared.mean
            or self.moving_variance._value is not prepared.variance
            or self.unbiased is not prepared.call.unbiased
            or (prepared.call.synchronized and self._joined() is not prepared.driver)
        ):
            return None
        shape = inputs.shape
        if shape != prepared.shape:
            axis = prepared.axis
            if len(shape) != self.ndim or shape[axis] != prepared.mean.size:
                return None
            prepared.shape, prepared.flat = shape, flat_shape(shape, axis)
        return self._train_alone(prepared, inputs.reshape(prepared.flat), shape, update_moving)

    def _train_alone(
        self, prepared: _Prepared, x: NDArray[Any], shape: tuple[int, ...], update_moving: bool
    ) -> tuple[NDArray[Any], SavedAlone] | None:
        """A training call on (A, C, B), its output in a shape; None: it does not fit the grid, nothing has happened."""
        gamma, beta = self.gamma, self.beta
        try:
            trained = prepared.kernels.train_alone(
                x, shape, prepared.before.forward, None if gamma is None else gamma._value,
                None if beta is None else beta._value, prepared.mean, prepared.variance, prepared.call,
            )  # fmt: skip
        except (TypeError, ValueError, BufferError):  # a variable of another dtype, say: before anything was read
            trained = None
        if trained is None:
            prepared.fits = False
            return None
        y, mean, variance, record, seen = trained
        if update_moving:
            with STATE_LOCK:
                prepared.mean, prepared.variance = mean, variance
                self.moving_mean._value, self.moving_variance._value = mean, variance
                prepared.calls += 1
                if self._prepared is not prepared:  # another thread has set an attribute meanwhile
                    self._commit(prepared)
        return y, SavedAlone(prepared, prepared.driver.called_alone(), x, shape, seen, record)

    def _pull_again(self, saved: SavedAlone, dy: ArrayLike) -> Gradients | None:
        """The backward pass of such a call; None: by the way of all calls, and nothing has happened."""
        prepared, x = self._prepared, saved.x
        if (
            prepared is None
            or saved.prepared is not prepared
            or type(dy) is not np.ndarray
            or dy.dtype is not x.dtype
            or dy.shape != saved.shape
            or not prepared.before.backward.is_probed
            or self.moving_mean._value is not prepared.mean
            or self.moving_variance._value is not prepared.variance
        ):
            return None
        gamma, beta = self.gamma, self.beta
        if not self._has_single_gradients():
            return None
        pulled = prepared.kernels.pull_alone(
            dy.reshape(x.shape),
            x,
            None,
            saved.seen,
            saved.shape,
            prepared.before.backward,
            saved.record,
            gamma is not None,
            beta is not None,
        )
        if pulled is not None:
            saved.prepared.driver.pulled_alone()
        return pulled
