"""`BatchNormalization`: Keras's layer on NumPy, whose statistics can be those of all ranks.

A training step is one trip down and straight back:

    layer(x, training=True)
     ├ rounds.forward                kernels.moments(x, grid) → collective.exchange → the totals of all ranks
     ├ state.after_forward           the moving update, the same function as the owner's
     └ kernels.normalize             y

Shape suffixes: C channels; the kernels see the data as (A, C, B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer import constraints, dtypes, initializers, regularizers
from bnlayer.base import Layer, automatic_name
from bnlayer.collective import Alone, Collective, current
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import kernels
from bnlayer.moments import BatchStatistics
from bnlayer.rounds import Rounds, share
from bnlayer.serialization import described
from bnlayer.state import LayerState
from bnlayer.variable import Variable
from bnlayer.view import View


@dataclass(frozen=True, eq=False)
class _TrainingPass:
    """What the backward pass of a training call needs."""

    view: View
    statistics: BatchStatistics
    scale_C: NDArray[Any]


@dataclass(frozen=True, eq=False)
class _InferencePass:
    """What the backward pass of a call in inference mode needs: dx = scale·dy."""

    view: View
    scale_C: NDArray[Any]


class BatchNormalization(Layer):
    """Normalizes its inputs over all axes but one.

        training    y = γ·(x − μ)/√(v + ε) + β          moving ← moving·momentum + batch·(1 − momentum)
        inference   y = γ·(x − moving_mean)/√(moving_variance + ε) + β

    μ and v are the mean and the biased variance of the batch, of its unmasked values where there is a mask; with
    `synchronized=True`, of the union of all ranks' batches, whatever their sizes, with the same bits as if one
    process held it. Ranks exchange 6 (float64: 10) int64 words per channel and direction, never rows.

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
        renorm, renorm_clipping, renorm_momentum: batch renormalization; refused by this version.
        synchronized: whether the statistics are those of all ranks. All of them must then call the same
            synchronized layers in the same order.
        name: how the ranks of a job know the layer; made up where None.
        dtype: "float32" (default) or "float64": of the variables, the arithmetic and the output.
        trainable: False freezes the layer: inference mode, no update, no trainable weights, no losses.
        collective: the ranks to synchronize with; the process's current world (`bnworker.join()`) where None.
        grad_reduction: "global": `gamma.gradient` and `beta.gradient` are sums over all ranks already: don't
            reduce them again. "local": this rank's share, for a wrapper that reduces. Both are derivatives of
            the SUM over ranks of the local losses.

    Raises:
        ValueError: an argument is unknown, malformed or not supported.

    Source: Ioffe and Szegedy, "Batch Normalization" (2015); `keras.layers.BatchNormalization`, Keras 3.15.1.
    """

    supports_masking = True

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        collective: Collective | None = None,
        grad_reduction: Literal["global", "local"] = "global",
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"Unrecognized keyword arguments passed to BatchNormalization: {unknown}")
        if renorm or renorm_clipping is not None:
            raise ValueError("Batch renormalization is not supported by this version: expected renorm=False.")
        if collective is not None and not synchronized:
            raise ValueError("collective= was given, but synchronized=False: such a layer exchanges nothing.")
        if grad_reduction not in ("global", "local"):
            raise ValueError(f"grad_reduction: expected 'global' or 'local', received {grad_reduction!r}.")
        super().__init__(str(name) if name is not None else automatic_name("batch_normalization"), bool(trainable))
        self.axis, self.momentum, self.epsilon = int(axis), float(momentum), float(epsilon)
        self.center, self.scale = bool(center), bool(scale)
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.moving_mean_initializer = initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = initializers.get(moving_variance_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.renorm, self.renorm_clipping, self.renorm_momentum = False, None, float(renorm_momentum)
        self.synchronized = bool(synchronized)
        self.dtype = dtypes.policy_name(dtype)
        self.collective, self.grad_reduction = collective, grad_reduction
        self.built = False
        self.gamma: Variable | None = None
        self.beta: Variable | None = None
        self._ndim = 0
        self._version = 0
        self._rounds: Rounds | None = None
        self._pass: _TrainingPass | _InferencePass | None = None

    # Shapes and variables

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the variables for inputs of a shape; the first call does it.

        Args:
            input_shape: its length and the channel dimension matter.

        Raises:
            ValueError: the axis lies outside the shape, or the channel dimension is undefined.
        """
        channels = tuple(input_shape)[self._axis_of(input_shape)]
        if channels is None:
            raise ValueError(
                f"Axis {self.axis} of the input must have a defined dimension, the number of channels. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        shape, dtype = (int(channels),), np.dtype(self.dtype)
        self._variables = []
        if self.scale:
            gamma = self.gamma_initializer(shape, dtype)
            self.gamma = Variable(gamma, "gamma", True, self.gamma_regularizer, self.gamma_constraint)
            self._variables.append(self.gamma)
        if self.center:
            beta = self.beta_initializer(shape, dtype)
            self.beta = Variable(beta, "beta", True, self.beta_regularizer, self.beta_constraint)
            self._variables.append(self.beta)
        self.moving_mean = Variable(self.moving_mean_initializer(shape, dtype), "moving_mean", False)
        self.moving_variance = Variable(self.moving_variance_initializer(shape, dtype), "moving_variance", False)
        self._variables += [self.moving_mean, self.moving_variance]
        self._grid = Grid.unknown(self.dtype, shape[0])
        self._backward_grid = BackwardGrid.unknown(self.dtype, shape[0])
        self._ndim = len(tuple(input_shape))
        self.built = True

    def _axis_of(self, input_shape: Sequence[int | None]) -> int:
        shape = tuple(input_shape)
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"Axis {self.axis} is out of bounds for input shape {shape}. Received: axis={self.axis}")
        return self.axis % len(shape)

    def _pinned_axis(self, shape: tuple[int, ...]) -> int:
        """The channel axis of an input, which must be like the one the layer was built for."""
        axis, channels = self._axis_of(shape), self.moving_mean.shape[0]
        if len(shape) != self._ndim or shape[axis] != channels:
            raise ValueError(
                f"Input of layer {self.name!r} is incompatible with it: expected ndim={self._ndim} and {channels} "
                f"channels on axis {self.axis}, received shape {shape}: ndim={len(shape)} and {shape[axis]} channels."
            )
        return axis

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """The input's shape.

        Raises:
            ValueError: the axis lies outside it.
        """
        self._axis_of(input_shape)
        return tuple(input_shape)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """The mask passes through."""
        del inputs
        return previous_mask

    # The step

    def __call__(self, inputs: ArrayLike, training: bool | None = None, mask: ArrayLike | None = None) -> NDArray[Any]:
        """Normalize a batch.

        Args:
            inputs: any rank and any real dtype; cast to the layer's dtype. `backward` reads it again: don't
                write to it in between.
            training: True: normalize with the batch's statistics and update the moving ones. False or None:
                normalize with the moving statistics, without any exchange.
            mask: bool, of one dimension less than the inputs; False keeps a position out of the statistics;
                such a position is still normalized.

        Returns:
            A new array of the inputs' shape and the layer's dtype.

        Raises:
            ValueError: the inputs' shape contradicts the one the layer was built for, or the mask's the inputs'.
            TypeError: the inputs are not real numbers.
            RuntimeError: synchronized, and several ranks are announced, but no world was joined.
            CollectiveError: a synchronized exchange could not complete.
        """
        x = dtypes.as_compute(inputs, self.dtype, "inputs")
        if not self.built:
            self.build(x.shape)
        view = View.of(x, self._pinned_axis(x.shape), mask)
        if not (training and self.trainable):
            return self._infer(view, keep=bool(training))
        rounds = self._joined()
        result = rounds.forward(view, self._grid)
        statistics = result.statistics
        self._settle(statistics, result.grid, masked=view.mask is not None)
        if result.version is not None and result.version != self._version:
            # The owner's state was replaced in between: somebody pushed.
            self._follow(rounds.collective.pull(self.name))
        scale = self._scale(statistics.inverse_std)
        self._pass = _TrainingPass(view, statistics, scale.astype(self.dtype))
        y = kernels().normalize(
            view.x,
            statistics.rounded_mean,
            self._pass.scale_C,
            self._shift(-statistics.residual * scale),
            statistics.poisoned,
        )
        return view.restore(y)

    def _infer(self, view: View, *, keep: bool) -> NDArray[Any]:
        mean, variance = self.moving_mean.value, self.moving_variance.value
        with np.errstate(invalid="ignore"):
            inverse_std = 1.0 / np.sqrt(variance.astype(np.float64) + self.epsilon)
        scale = self._scale(inverse_std).astype(self.dtype)
        nothing = np.zeros(mean.shape)
        if keep or not isinstance(self._pass, _TrainingPass):
            self._pass = _InferencePass(view, scale)
        return view.restore(kernels().normalize(view.x, mean, scale, self._shift(nothing), nothing.astype(bool)))

    def backward(self, dy: ArrayLike) -> NDArray[Any]:
        """The gradient of the inputs of the latest training call; fills `gamma.gradient` and `beta.gradient`.

            dx = γs·(dy − (m/D)·[A + s²·B·((x − μ) − μ·e/D)])        dγ = s·B        dβ = A

        with A = Σdy and B = Σdy·(x − μ) over all positions and ranks, m the mask, D = Σm + e. In inference mode (the
        layer is frozen, or only inference came since the last backward) dx = γs·dy with the moving statistics:
        nothing is exchanged, and gamma and beta get no gradient.

        Args:
            dy: the gradient of the output, of its shape.

        Returns:
            A new array of the inputs' shape and the layer's dtype.

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
        gradient = dtypes.as_compute(dy, self.dtype, "dy")
        if gradient.shape != view.shape:
            raise ValueError(
                f"Layer {self.name!r}: expected dy of the output's shape {view.shape}, received {gradient.shape}."
            )
        gradient = view.alike(gradient)
        self._pass = None
        if isinstance(latest, _InferencePass):
            self._set_gradients(None, None)
            return view.restore(gradient * latest.scale_C[:, None])
        statistics = latest.statistics
        result = self._joined().backward(gradient, view, statistics, self._backward_grid)
        self._backward_grid = result.grid.kept(statistics.reach)
        total = result.total
        summed = total if self.grad_reduction == "global" else share(result, statistics)
        self._set_gradients(summed.gamma, summed.beta)
        dx = kernels().input_gradient(
            gradient,
            view.x,
            view.mask,
            statistics.rounded_mean,
            total.offset.astype(self.dtype),
            total.slope.astype(self.dtype),
            latest.scale_C,
            total.poisoned,
        )
        return view.restore(dx)

    def _joined(self) -> Rounds:
        """The exchanges with the collective in force; a new collective is enrolled with first."""
        if not self.synchronized:
            self._rounds = self._rounds or Rounds(Alone(), self.name, self.dtype, self.momentum, self.epsilon)
            return self._rounds
        collective = self.collective if self.collective is not None else current()
        if self._rounds is None or self._rounds.collective is not collective:
            rounds = Rounds(collective, self.name, self.dtype, self.momentum, self.epsilon)
            self._follow(rounds.enroll(self, self.state))
            self._rounds = rounds
        return self._rounds

    def _settle(self, statistics: BatchStatistics, grid: Grid, *, masked: bool) -> None:
        self._follow(
            self.state.after_forward(statistics, grid, self.momentum, synchronized=self.synchronized, masked=masked)
        )

    def _scale(self, inverse_std: NDArray[np.float64]) -> NDArray[np.float64]:
        return inverse_std if self.gamma is None else self.gamma.value.astype(np.float64) * inverse_std

    def _shift(self, offset: NDArray[np.float64]) -> NDArray[Any]:
        shift = offset if self.beta is None else self.beta.value.astype(np.float64) + offset
        return shift.astype(self.dtype)

    def _set_gradients(self, gamma: NDArray[np.float64] | None, beta: NDArray[np.float64] | None) -> None:
        for variable, gradient in ((self.gamma, gamma), (self.beta, beta)):
            if variable is not None:
                variable.gradient = None if gradient is None else gradient.astype(variable.dtype)

    # What travels

    @property
    def state(self) -> LayerState:
        """The moving statistics and grids, as their owner keeps them.

        Raises:
            ValueError: the layer is not built yet.
        """
        self._must_be_built()
        return LayerState(
            self.moving_mean.value,
            self.moving_variance.value,
            self._grid,
            self._backward_grid,
            self._version,
        )

    def restore(self, state: LayerState) -> None:
        """Take over moving statistics and grids.

        Raises:
            ValueError: the layer is not built yet, or the state belongs to another number of channels or dtype.
        """
        self._must_be_built()
        if (state.channels, state.forward.dtype) != (self.moving_mean.shape[0], self.dtype):
            raise ValueError(
                f"Layer {self.name!r}: expected a state of {self.moving_mean.shape[0]} channels in {self.dtype}, "
                f"received {state.channels} channels in {state.forward.dtype}."
            )
        self._follow(state)

    def _follow(self, state: LayerState | None) -> None:
        if state is None:
            return
        self.moving_mean.assign(state.moving_mean)
        self.moving_variance.assign(state.moving_variance)
        self._grid, self._backward_grid, self._version = state.forward, state.backward, state.version

    def _must_be_built(self) -> None:
        if not self.built:
            raise ValueError(f"Layer {self.name!r} has no state yet: call it once, or build(input_shape).")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments in Keras's serialized form; `collective` and `grad_reduction` are no part.

        Raises:
            ValueError: an argument is a plain callable, which has no serialized form.
        """
        vocabularies = ("initializers", "regularizers", "constraints")
        objects = {
            f"{owner}_{kind[:-1]}": described(getattr(self, f"{owner}_{kind[:-1]}"), f"keras.{kind}")
            for kind in vocabularies
            for owner in ("beta", "gamma", "moving_mean", "moving_variance")
            if kind == "initializers" or not owner.startswith("moving")
        }
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": dtypes.policy_config(self.dtype),
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            **objects,
            "synchronized": self.synchronized,
            "renorm": self.renorm,
            "renorm_clipping": self.renorm_clipping,
            "renorm_momentum": self.renorm_momentum,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The layer that a configuration describes, Keras's own included."""
        return cls(**config)
