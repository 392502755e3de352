"""`BatchNormalization`: Keras's layer on NumPy, whose statistics can be those of all ranks.

A training step is one trip down and straight back:

    layer(x, training=True)
     ├ driver.forward                kernels.moments(x, grid) → collective.exchange → the totals of all ranks
     ├ state.after_forward           the moving update, the same function as the owner's
     └ kernels.normalize             y

And a backward step, of the call before or by the handle of any call (`pullback.py`):

    pullback(dy)
     ├ driver.backward               kernels.gradient_sums(dy, x, grid) → collective.exchange → the totals of all ranks
     ├ state.after_backward          the grid
     └ kernels.input_gradient        dx

Shape suffixes: C channels; the kernels see the data as (A, C, B).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.alone import Gradients, MemberAlone, SavedAlone
from bnlayer.dtypes import cast
from bnlayer.errors import CollectiveError
from bnlayer.exchange_driver import Changes, ExchangeDriver
from bnlayer.grid import Grid
from bnlayer.kernels import kernels
from bnlayer.kernels.results import BatchStatistics, Trained, TrainingCall
from bnlayer.membership import STATE_LOCK
from bnlayer.moments import MASKED_COUNT_EPSILON, Moments
from bnlayer.moving import Moving, Rule
from bnlayer.pullback import Pullback, SavedInference, SavedTraining
from bnlayer.state import LayerState
from bnlayer.tiling import passes, passes_of
from bnlayer.view import View

Saved = SavedTraining | SavedAlone | SavedInference


class BatchNormalization(MemberAlone):
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
        own_weights: whether each rank has a gamma and a beta of its own, as in local SGD. Otherwise all must begin
            with the same ones: they are compared when the layer enrolls with the ranks, and at the next exchange after
            `set_weights` or `interchange.load_into` (not after each `assign`, which optimizers use).

    Raises:
        ValueError: an argument is unknown, malformed or not supported.

    Source: Ioffe and Szegedy, "Batch Normalization" (2015); `keras.layers.BatchNormalization`, Keras 3.15.1.
    """

    # The step

    def __call__(
        self,
        inputs: ArrayLike,
        training: bool | None = None,
        mask: ArrayLike | None = None,
        *,
        update_moving: bool = True,
    ) -> NDArray[Any]:
        """Normalize a batch.

        Args:
            inputs: any rank and any real dtype; cast to the compute dtype. The backward pass reads it again: don't
                write to it before.
            training: True: normalize with the batch's statistics and update the moving ones. False or None:
                normalize with the moving statistics, without any exchange.
            mask: bool, of one dimension less than the inputs; False keeps a position out of the statistics;
                such a position is still normalized.
            update_moving: False: normalize with the batch's statistics, and update nothing: for a call that is computed
                once more, as gradient checkpointing does. On the same rows, such a call gives the same bits as the one
                before it; but with renorm, whose corrections follow the moving statistics, which that one has updated:
                make the first of the two the one that updates nothing.

        Returns:
            A new array of the inputs' shape and the compute dtype.

        Raises:
            ValueError: the inputs' shape contradicts the one the layer was built for, or the mask's the inputs'; or
                synchronized, and moving statistics were set to NaN or infinity.
            TypeError: the inputs are not real numbers, or an array of a kind whose meaning would be lost.
            RuntimeError: synchronized, and several ranks are announced, but no world was joined; or the dtype policy
                was set to one of another arithmetic since the layer was built.
            CollectiveError: a synchronized exchange could not complete.
        """
        done = self._train_again(inputs, update_moving) if training and mask is None else None
        y, saved = self._normalize(inputs, training, mask, update_moving) if done is None else done
        waiting = self._waiting
        if training:
            # After several calls backward() can't know which one its gradient belongs to: no batch is kept.
            waiting.calls += 1
            waiting.saved = saved if waiting.calls == 1 else None
        elif not waiting.calls:
            waiting.saved = saved
        return y

    def vjp(
        self,
        inputs: ArrayLike,
        training: bool | None = None,
        mask: ArrayLike | None = None,
        *,
        update_moving: bool = True,
    ) -> tuple[NDArray[Any], Pullback]:
        """Normalize a batch, and get a handle for its gradients.

            y, pullback = layer.vjp(x, training=True)
            dinputs, dgamma, dbeta = pullback(dy)

        Any number of calls may wait for their gradients: those of siamese branches, of a discriminator's two batches,
        of the steps of an unrolled network. Pull them back in any order that all ranks share. A handle keeps its batch
        for as long as it lives, and may be used again, for another dy; one that is dropped leaves nothing behind.

        The arguments and errors are those of a call; `pullback` raises what `backward` does. It returns what `backward`
        computes, dgamma and dbeta as `grad_reduction` says (None where there is no such weight, and in inference mode),
        and writes to no variable's `.gradient`. `backward` ignores these calls.
        """
        done = self._train_again(inputs, update_moving) if training and mask is None else None
        y, saved = self._normalize(inputs, training, mask, update_moving) if done is None else done
        return y, partial(self._pull, saved)

    def _normalize(
        self, inputs: ArrayLike, training: bool | None, mask: ArrayLike | None, update_moving: bool
    ) -> tuple[NDArray[Any], SavedTraining | SavedInference]:
        x = self.dtype_policy.received(inputs, "inputs")
        unbuilt = None if self.built else self.__dict__.copy()
        try:
            if unbuilt is not None:
                self.build(x.shape)
            view = View.of(x, self._pinned_axis(x.shape), mask)
            driver = self._joined() if training and self.trainable else None
        except Exception as error:
            # A first call that is refused must not fix the layer's shape. A failed enrolment does not count as refused.
            if unbuilt is not None and not isinstance(error, CollectiveError):
                self.__dict__ = unbuilt
            raise
        if driver is None:
            return self._infer(view)
        y, saved = self._train(driver, view, bool(update_moving))
        if not saved.seen:
            saved.seen = passes().kernels.sample(view.x)
        return view.restore(y), saved

    def _train(self, driver: ExchangeDriver, view: View, update_moving: bool) -> tuple[Any, SavedTraining]:
        """A training call; its output as (A, C, B)."""
        before = self.state
        self._must_fit(before, before.channels, self.dtype_policy.arithmetic)
        changes = self._changes(before)
        prepared = self._prepare(driver, view, before) if changes is None and before.forward.is_probed else None
        done = self._train_alone(prepared, view.x, view.x.shape, update_moving) if prepared is not None else None
        if done is not None:
            y, saved = done
            return y, saved.general(view)
        self._drop_prepared()
        return self._train_with_ranks(driver, view, before, changes, update_moving)

    @np.errstate(all="ignore")  # the user's settings must not end an exchange that other ranks are in
    def _train_with_ranks(
        self, driver: ExchangeDriver, view: View, before: LayerState, changes: Changes | None, update_moving: bool
    ) -> tuple[Any, SavedTraining]:
        """A training call whose statistics are agreed upon."""
        signature = self._signature()
        trained: Trained | None = None

        def finish(
            limbs: NDArray[np.int64], grid: Grid, accepted: bool
        ) -> tuple[BatchStatistics, NDArray[np.bool_] | None]:
            nonlocal trained
            trained = passes().finish_forward(view, limbs, grid, self._call(before.moving, view), accepted=accepted)
            return trained.statistics, trained.refused

        # The corrections of renorm come between the statistics and the rest.
        arguments = view, signature, before.forward, changes
        in_one = finish if view.passes is None and self._renorm is None else None
        result = driver.forward(*arguments, update_moving=update_moving, finish=in_one)
        statistics = result.statistics
        if self._observer is not None:
            self._observer(result.moments)
        rule: Rule | Moving | None = None
        if update_moving and trained is not None and trained.mean is not None and trained.variance is not None:
            rule = Moving(trained.mean, trained.variance)
        elif update_moving:
            masked = view.mask is not None
            rule = Rule(self.momentum, self.epsilon, self.renorm_momentum, self.synchronized, masked, self.unbiased)
        after = self._keep(before.after_forward(statistics, result.grid, rule))
        if result.version is not None and result.version != after.version:
            self._take_over(driver)
        r = d = None
        scale = None if trained is None else trained.scale
        if trained is not None and trained.y is not None and scale is not None:
            y = trained.y
        else:
            r, d = (None, None) if self._renorm is None else self._correction(statistics, before.moving)
            scale, shift = self._corrected(statistics, r, d)
            coefficients = statistics.rounded_mean, scale, shift, statistics.nonfinite
            y = passes_of(view).normalize(view, *coefficients, self.compute_dtype)
        batch = trained.batch_statistics if trained is not None and driver.alone else statistics
        return y, SavedTraining(driver, signature, result.step, view, b"", batch, scale, r, d)

    def _keep(self, after: LayerState) -> LayerState:
        """Commit the state after an exchange, which carried all that was set before."""
        with STATE_LOCK:
            self._take(after)
            self._changes_announced()
        return after

    @np.errstate(all="ignore")
    def _infer(self, view: View) -> tuple[NDArray[Any], SavedInference]:
        with STATE_LOCK:  # both of one call, whoever trains meanwhile
            moving_mean, moving_variance = self.moving_mean.value, self.moving_variance.value
        dtype, variance = self.dtype_policy.arithmetic_dtype, moving_variance.astype(np.float64)
        scale = (self._gamma() / np.sqrt(variance + self.epsilon)).astype(dtype)
        mean, shift = moving_mean.astype(dtype), self._beta().astype(dtype)
        none_nonfinite = np.zeros(mean.shape, bool)
        y = passes().normalize(view, mean, scale, shift, none_nonfinite, self.compute_dtype)
        return view.restore(y), SavedInference(view.shape, view.x.shape, scale)

    def backward(self, dy: ArrayLike) -> NDArray[Any]:
        """The gradient of the inputs of the one training call before; fills `gamma.gradient` and `beta.gradient`.

            dx = γs·(dy − (m/D)·[A + s²·B·((x − μ) − μ·e/D)])        dγ = s·B        dβ = A

        with A = Σdy and B = Σdy·(x − μ) over all positions and ranks, m the mask, D = Σm + e. In inference mode (the
        layer is frozen, or only inference came since the last backward) dx = γs·dy with the moving statistics:
        nothing is exchanged, and gamma and beta get no gradient.

        Gradients are overwritten, not added. For several calls before their gradients, see `vjp`.

        Args:
            dy: the gradient of the output, of its shape.

        Returns:
            A new array of the inputs' shape and the compute dtype.

        Raises:
            RuntimeError: no call was made since the last backward, or more than one in training mode; or, since the
                call, the inputs were found to have been written to, or the layer was built anew for others.
            ValueError: dy has another shape than the output.
            TypeError: dy is not of real numbers, or an array of a kind whose meaning would be lost.
            CollectiveError: a synchronized exchange could not complete.
        """
        saved: Saved | None = self._waiting.saved
        calls = self._waiting.calls
        if saved is None and not calls:
            raise RuntimeError(
                f"Layer {self.name!r}: backward() belongs to the latest training call, and there was none since the "
                "last backward(). Call the layer with training=True first."
            )
        if saved is None:
            self.forget_calls()
            raise RuntimeError(
                f"Layer {self.name!r}: backward() belongs to one training call, and there were {calls} since the last "
                "backward(): whose gradient this is can't be known. Take a handle for each call: "
                "y, pullback = layer.vjp(x, training=True); dx, dgamma, dbeta = pullback(dy)."
            )
        dx, dgamma, dbeta = self._pull(saved, dy, forget=True)
        for variable, gradient in ((self.gamma, dgamma), (self.beta, dbeta)):
            if variable is not None:
                variable.gradient = gradient
        return dx

    def forget_calls(self) -> None:
        """Drop the calls that wait for `backward`: they were made for their statistics alone."""
        self._waiting.saved, self._waiting.calls = None, 0

    def _pull(self, saved: Saved, dy: ArrayLike, *, forget: bool = False) -> Gradients:
        if isinstance(saved, SavedAlone):
            done = self._pull_again(saved, dy)
            if done is not None:
                if forget:
                    self.forget_calls()
                return done
            saved = saved.general(saved.view)
        return self._pull_checked(saved, dy, forget=forget)

    @np.errstate(all="ignore")
    def _pull_checked(self, saved: SavedTraining | SavedInference, dy: ArrayLike, *, forget: bool) -> Gradients:
        gradient = self.dtype_policy.received(dy, "dy")
        if gradient.shape != saved.shape:
            raise ValueError(
                f"Layer {self.name!r}: expected dy of the output's shape {saved.shape}, received {gradient.shape}."
            )
        if isinstance(saved, SavedInference):
            if forget:
                self.forget_calls()
            return saved.pull(gradient, self.compute_dtype), None, None
        if saved.was_written_to:
            if forget:
                self.forget_calls()
            raise RuntimeError(
                f"Layer {self.name!r}: the inputs were written to between their call and its backward pass, which "
                "reads them again. Give the call a copy, or write into another array."
            )
        results = self._pull_training(saved, gradient)
        if forget:
            self.forget_calls()  # not before: the exchange may have been refused, and may be repeated
        return results

    def _pull_training(self, saved: SavedTraining, gradient: Any) -> Gradients:
        """The backward pass of a training call, for a dy of the compute dtype and the output's shape."""
        state = self.state
        self._must_fit(state, saved.signature.channels, saved.signature.dtype)
        changes = self._changes(state)
        done = None
        if changes is None and self._has_single_gradients():
            done = saved.pull_alone(gradient, state.backward, self.gamma is not None, self.beta is not None)
        if done is not None:
            return done
        pulled = saved.pull(gradient, state.backward, self.grad_reduction, self.compute_dtype, changes)
        self._kept = state.after_backward(pulled.grid)
        self._changes_announced()
        gamma, beta = (
            None if variable is None else cast(vector, variable.dtype)
            for variable, vector in ((self.gamma, pulled.gamma), (self.beta, pulled.beta))
        )
        return pulled.dx, gamma, beta

    def _take_over(self, driver: ExchangeDriver) -> None:
        """Follow the owner, whose state was replaced in between, by a push."""
        owned = driver.collective.pull(self.name)
        if owned is not None:
            self.follow(owned)

    def _call(self, moving: Moving, view: View) -> TrainingCall:
        """What a training call's results follow from."""
        e = MASKED_COUNT_EPSILON if view.mask is not None else 0.0
        gamma, beta = self.gamma, self.beta
        return TrainingCall(
            self.epsilon,
            e,
            None if gamma is None else gamma.value,
            None if beta is None else beta.value,
            moving.mean,
            moving.variance,
            self.momentum,
            self.synchronized,
            self.unbiased,
            self.compute_dtype,
        )

    def _correction(
        self, statistics: BatchStatistics, moving: Moving
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The corrections of renorm, against the statistics as they were before the call."""
        assert self._renorm is not None
        assert moving.renorm_mean is not None
        assert moving.renorm_stddev is not None
        return self._renorm.correction(statistics, moving.renorm_mean, moving.renorm_stddev, self.epsilon)

    def _corrected(
        self, statistics: BatchStatistics, r: NDArray[np.float64] | None, d: NDArray[np.float64] | None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """What the centered input is multiplied by, γs (with renorm γsr), and added, β − residual·γs (+ γd)."""
        dtype = self.dtype_policy.arithmetic_dtype
        if r is None or d is None:
            gamma, beta = (None if variable is None else variable.value for variable in (self.gamma, self.beta))
            return kernels().coefficients(statistics, gamma, beta, dtype)
        factor = self._gamma() * statistics.inverse_std * r
        term = self._beta() - statistics.residual * factor + self._gamma() * d
        return factor.astype(dtype), term.astype(dtype)

    def _gamma(self) -> NDArray[np.float64]:
        return np.ones(self.moving_mean.shape) if self.gamma is None else self.gamma.value.astype(np.float64)

    def _beta(self) -> NDArray[np.float64]:
        return np.zeros(self.moving_mean.shape) if self.beta is None else self.beta.value.astype(np.float64)

    def observe(self, observer: Callable[[Moments], None] | None) -> None:
        """Call `observer` with the global batch's exact moments at each training call; None removes it."""
        self._observer = observer
