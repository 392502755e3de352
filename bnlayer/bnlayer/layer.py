"""`BatchNormalization`: Keras's layer on NumPy, whose statistics can be those of all ranks.

A training step is one trip down and straight back:

    layer(x, training=True)
     ├ rounds.forward                kernels.moments(x, grid) → collective.exchange → the totals of all ranks
     ├ state.after_forward           the moving update, the same function as the owner's
     └ kernels.normalize             y

Shape suffixes: C channels; the kernels see the data as (A, C, B).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer import tiling
from bnlayer.collective import Alone, LayerSignature, current, is_current
from bnlayer.definition import Definition
from bnlayer.dtypes import rounded
from bnlayer.errors import CollectiveError
from bnlayer.exchange_driver import ExchangeDriver, share
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels.choice import quick_channels
from bnlayer.moments import BatchStatistics, Moments
from bnlayer.moving import Moving, Rule
from bnlayer.state import LayerState
from bnlayer.view import View


@dataclass(frozen=True, eq=False)
class _TrainingPass:
    """What the backward pass of a training call needs.

    Attributes:
        rounds: with the ranks that the batch was shared with.
        terms: as they were then.
        view: the batch.
        statistics: of the global batch.
        scale_C: γs, or γrs with renorm: what multiplies the centered input.
        r_C, d_C: the corrections of renorm; None without.
    """

    driver: ExchangeDriver
    signature: LayerSignature
    view: View
    statistics: BatchStatistics
    scale_C: NDArray[Any]
    r_C: NDArray[np.float64] | None = None
    d_C: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class _InferencePass:
    """What the backward pass of a call in inference mode needs: dx = scale·dy."""

    view: View
    scale_C: NDArray[Any]


class BatchNormalization(Definition):
    """Normalizes its inputs over all axes but one.

        training    y = γ·(x − μ)/√(v + ε) + β          moving ← moving·momentum + batch·(1 − momentum)
        inference   y = γ·(x − moving_mean)/√(moving_variance + ε) + β

    μ and v are the mean and the biased variance of the batch, of its unmasked values where there is a mask; with
    `synchronized=True`, of the union of all ranks' batches, whatever their sizes, with the same bits as if one
    process held it. Ranks exchange 6 (float64: 10) int64 limbs per channel and direction, never rows.

    Args:
        axis: the axis that holds the channels.
        momentum: weight of the old value in the moving update.
        epsilon: added to the variance before the root.
        center: whether there is a β.
        scale: whether there is a γ.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: by name, by
            Keras's configuration, by instance, or a callable of (shape, dtype).
        beta_regularizer, gamma_regularizer: penalties; see `losses` and `regularizer_gradients`.
        beta_constraint, gamma_constraint: projections, applied by the optimizer after its update.
        renorm, renorm_clipping, renorm_momentum: batch renormalization, see `bnlayer.renorm`; r and d come from
            the global statistics.
        synchronized: whether the statistics are those of all ranks. All of them must then call the same
            synchronized layers in the same order.
        name: how the ranks of a job know the layer; made up where None.
        dtype: a policy: "float32" (default), "float64", "float16", "bfloat16", "mixed_float16" or
            "mixed_bfloat16", see `bnlayer.dtypes`. float64 is computed in float64 (Keras: in float32).
        trainable: False freezes the layer: inference mode, no update, no trainable weights, no losses.
        collective: the ranks to synchronize with; the process's current world (`bnworker.join()`) where None.
        grad_reduction: "global": `gamma.gradient` and `beta.gradient` are sums over all ranks already: don't
            reduce them again. "local": this rank's share, for a wrapper that reduces. Both are derivatives of
            the SUM over ranks of the local losses.

    Raises:
        ValueError: an argument is unknown, malformed or not supported.

    Source: Ioffe and Szegedy, "Batch Normalization" (2015); `keras.layers.BatchNormalization`, Keras 3.15.1.
    """

    _kept: LayerState | None = None
    _signature_cache: LayerSignature | None = None
    _driver: ExchangeDriver | None = None
    _pass: _TrainingPass | _InferencePass | None = None
    _observer: Callable[[Moments], None] | None = None

    # The step

    @np.errstate(all="ignore")  # the user's settings must not end an exchange that other ranks are in
    def __call__(self, inputs: ArrayLike, training: bool | None = None, mask: ArrayLike | None = None) -> NDArray[Any]:
        """Normalize a batch.

        Args:
            inputs: any rank and any real dtype; cast to the compute dtype. `backward` reads it again: don't
                write to it in between.
            training: True: normalize with the batch's statistics and update the moving ones. False or None:
                normalize with the moving statistics, without any exchange.
            mask: bool, of one dimension less than the inputs; False keeps a position out of the statistics;
                such a position is still normalized.

        Returns:
            A new array of the inputs' shape and the compute dtype.

        Raises:
            ValueError: the inputs' shape contradicts the one the layer was built for, or the mask's the inputs'.
            TypeError: the inputs are not real numbers.
            RuntimeError: synchronized, and several ranks are announced, but no world was joined.
            CollectiveError: a synchronized exchange could not complete.
        """
        x = self.dtype_policy.received(inputs, "inputs")
        unbuilt = None if self.built else self.__dict__.copy()
        try:
            if unbuilt is not None:
                self.build(x.shape)
            view = View.of(x, self._pinned_axis(x.shape), mask)
            driver = self._joined() if training and self.trainable else None
        except Exception as error:
            # A first call that is refused must not fix the layer's shape. An enrolment that failed was no refusal.
            if unbuilt is not None and not isinstance(error, CollectiveError):
                self.__dict__ = unbuilt
            raise
        if driver is None:
            return self._infer(view, keep=bool(training))
        before, signature = self.state, self._signature()
        result = driver.forward(view, signature, before.forward)
        statistics = result.statistics
        if self._observer is not None:
            self._observer(result.moments)
        rule = Rule(self.momentum, self.epsilon, self.renorm_momentum, self.synchronized, view.mask is not None)
        self._kept = after = before.after_forward(statistics, result.grid, rule)
        for variable, vector in zip(self._moving, after.moving.values, strict=True):
            variable.take(vector)
        if result.version is not None and result.version != after.version:
            # The owner's state was replaced in between: somebody pushed.
            self._follow(driver.collective.pull(self.name))
        r, d = self._correction(statistics, before.moving)
        scale, shift = self._coefficients(statistics, r, d)
        self._pass = _TrainingPass(driver, signature, view, statistics, scale, r, d)
        return view.restore(
            tiling.normalize(view, statistics.rounded_mean, scale, shift, statistics.nonfinite, self.compute_dtype)
        )

    def _infer(self, view: View, *, keep: bool) -> NDArray[Any]:
        dtype, variance = self.dtype_policy.arithmetic_dtype, self.moving_variance.value.astype(np.float64)
        with np.errstate(invalid="ignore"):
            scale = (self._gamma() / np.sqrt(variance + self.epsilon)).astype(dtype)
        if keep or not isinstance(self._pass, _TrainingPass):
            self._pass = _InferencePass(view, scale)
        mean, shift = self.moving_mean.value.astype(dtype), self._beta().astype(dtype)
        none_nonfinite = np.zeros(mean.shape, bool)
        return view.restore(tiling.normalize(view, mean, scale, shift, none_nonfinite, self.compute_dtype))

    @np.errstate(all="ignore")
    def backward(self, dy: ArrayLike) -> NDArray[Any]:
        """The gradient of the inputs of the latest training call; fills `gamma.gradient` and `beta.gradient`.

            dx = γs·(dy − (m/D)·[A + s²·B·((x − μ) − μ·e/D)])        dγ = s·B        dβ = A

        with A = Σdy and B = Σdy·(x − μ) over all positions and ranks, m the mask, D = Σm + e. In inference mode (the
        layer is frozen, or only inference came since the last backward) dx = γs·dy with the moving statistics:
        nothing is exchanged, and gamma and beta get no gradient.

        Args:
            dy: the gradient of the output, of its shape.

        Returns:
            A new array of the inputs' shape and the compute dtype.

        Raises:
            RuntimeError: no call came since the last backward.
            ValueError: dy has another shape than the output.
            CollectiveError: a synchronized exchange could not complete.
        """
        latest = self._pass
        if latest is None:
            raise RuntimeError(
                f"Layer {self.name!r}: backward() belongs to the latest training call, and there was none since the "
                "last backward(). Call the layer with training=True first."
            )
        view = latest.view
        gradient = self.dtype_policy.received(dy, "dy")
        if gradient.shape != view.shape:
            raise ValueError(
                f"Layer {self.name!r}: expected dy of the output's shape {view.shape}, received {gradient.shape}."
            )
        seen = view.alike(gradient)
        if isinstance(latest, _InferencePass):
            self._pass = None
            self._set_gradients(None, None)
            return view.restore(tiling.scaled(seen, latest.scale_C, self.compute_dtype))
        statistics = latest.statistics
        result = latest.driver.backward(seen, view, latest.signature, statistics, self.state.backward)
        self._pass = None  # not before: the exchange may have been refused, and asked for again
        self._kept = self.state.after_backward(result.grid, statistics)
        total = result.total
        summed = total if self.grad_reduction == "global" else share(result, statistics)
        gamma = summed.gamma
        if latest.r_C is not None and latest.d_C is not None:
            # With renorm the output is γ·(x̂·r + d) + β, and neither r nor d is differentiated.
            gamma = gamma * latest.r_C + summed.beta * latest.d_C
        self._set_gradients(gamma, summed.beta)
        dtype = self.dtype_policy.arithmetic_dtype
        dx = tiling.input_gradient(
            seen,
            view,
            statistics.rounded_mean,
            total.offset.astype(dtype),
            total.slope.astype(dtype),
            latest.scale_C,
            total.nonfinite,
            self.compute_dtype,
        )
        return view.restore(dx)

    def _joined(self) -> ExchangeDriver:
        """The exchanges with the collective in force; a new collective is enrolled with first."""
        if not self.synchronized:
            self._driver = self._driver or ExchangeDriver(Alone(), self.name)
            return self._driver
        if self._driver is not None and self.collective is None and is_current(self._driver.collective):
            return self._driver
        collective = self.collective if self.collective is not None else current()
        if self._driver is None or self._driver.collective is not collective:
            if self._driver is not None and self._driver.collective.world_size > 1 and isinstance(collective, Alone):
                raise RuntimeError(
                    f"Layer {self.name!r} belonged to a world of {self._driver.collective.world_size} ranks, which was "
                    "left: training on would be silently unsynchronized. Train inside `with bnworker.join()`, or make "
                    "a new layer for one process."
                )
            driver = ExchangeDriver(collective, self.name)
            self._follow(driver.enroll(self, self._signature(), self.state))
            self._driver = driver
        return self._driver

    def _signature(self) -> LayerSignature:
        """What every rank must believe of this layer, whatever the call."""
        signature = self._signature_cache
        if signature is None or (signature.momentum, signature.epsilon, signature.renorm) != (
            self.momentum,
            self.epsilon,
            self._renorm,
        ):
            signature = self._signature_cache = LayerSignature(
                channels=self.moving_mean.shape[0],
                dtype=self.dtype_policy.arithmetic,
                momentum=self.momentum,
                epsilon=self.epsilon,
                policy=self.dtype_policy.name,
                renorm=self._renorm,
            )
        return signature

    def _correction(
        self, statistics: BatchStatistics, moving: Moving
    ) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
        """The corrections of renorm, against the statistics as they were before the call."""
        if self._renorm is None or moving.renorm_mean is None or moving.renorm_stddev is None:
            return None, None
        return self._renorm.correction(statistics, moving.renorm_mean, moving.renorm_stddev, self.epsilon)

    def _coefficients(
        self,
        statistics: BatchStatistics,
        r: NDArray[np.float64] | None,
        d: NDArray[np.float64] | None,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """What the centered input is multiplied by, γs (with renorm γsr), and what is added, β − residual·γs (+ γd)."""
        quick, dtype = quick_channels(), self.dtype_policy.arithmetic_dtype
        if quick is not None and r is None and dtype == np.float32 == self.variable_dtype:
            scale, shift = np.empty((2, self.moving_mean.shape[0]), np.float32)
            gamma, beta = (None if variable is None else variable.value for variable in (self.gamma, self.beta))
            quick.coefficients(gamma, beta, statistics.inverse_std, statistics.residual, scale, shift)
            return scale, shift
        factor = self._gamma() * statistics.inverse_std * (1.0 if r is None else r)
        term = self._beta() - statistics.residual * factor + (0.0 if d is None else self._gamma() * d)
        return factor.astype(dtype), term.astype(dtype)

    def _gamma(self) -> NDArray[np.float64]:
        return np.ones(self.moving_mean.shape) if self.gamma is None else self.gamma.value.astype(np.float64)

    def _beta(self) -> NDArray[np.float64]:
        return np.zeros(self.moving_mean.shape) if self.beta is None else self.beta.value.astype(np.float64)

    def _set_gradients(self, gamma: NDArray[np.float64] | None, beta: NDArray[np.float64] | None) -> None:
        for variable, gradient in ((self.gamma, gamma), (self.beta, beta)):
            if variable is not None:
                variable.gradient = None if gradient is None else rounded(gradient, variable.dtype)

    def observe(self, observer: Callable[[Moments], None] | None) -> None:
        """Be told of the global batch's exact moments at each training call; None: of nothing any more."""
        self._observer = observer

    # What travels

    @property
    def state(self) -> LayerState:
        """The moving statistics and grids, as their owner keeps them.

        Raises:
            ValueError: the layer is not built yet.
        """
        self._must_be_built()
        kept = self._kept
        if kept is None:
            channels, arithmetic = self.moving_mean.shape[0], self.dtype_policy.arithmetic
            grids = Grid.unknown(arithmetic, channels), BackwardGrid.unknown(arithmetic, channels)
            kept = LayerState(Moving(*(variable.value for variable in self._moving)), *grids)
        elif any(
            variable.value is not vector for variable, vector in zip(self._moving, kept.moving.values, strict=True)
        ):
            # Somebody assigned to a variable.
            kept = replace(kept, moving=Moving(*(variable.value for variable in self._moving)))
        self._kept = kept
        return kept

    def restore(self, state: LayerState) -> None:
        """Take over moving statistics and grids.

        Raises:
            ValueError: the layer is not built yet, or the state belongs to another number of channels or dtype.
        """
        self._must_be_built()
        if state.kind != self.state.kind:
            raise ValueError(f"Layer {self.name!r}: expected a state of {self.state.kind}, received {state.kind}.")
        self._follow(state)

    def _follow(self, state: LayerState | None) -> None:
        if state is None:
            return
        for variable, vector in zip(self._moving, state.moving.values, strict=True):
            variable.assign(vector)
        self._kept = state

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: no ranks, and no batch that waits for its backward pass."""
        return {**self.__dict__, "collective": None, "_driver": None, "_pass": None, "_observer": None}

    def _must_be_built(self) -> None:
        if not self.built:
            raise ValueError(f"Layer {self.name!r} has no state yet: call it once, or build(input_shape).")
