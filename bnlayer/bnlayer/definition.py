"""What a `BatchNormalization` is: its arguments, variables, shapes and configuration, Keras's to the letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from bnlayer import initializers
from bnlayer.arguments import channel_axis, number, without_keras_2
from bnlayer.base import Layer, automatic_name
from bnlayer.collective import Collective
from bnlayer.dtypes import Policy
from bnlayer.renorm import Renorm
from bnlayer.serialization import described
from bnlayer.variable import Variable

if TYPE_CHECKING:
    from bnlayer.constraints import Constraint
    from bnlayer.regularizers import Regularizer


class Definition(Layer):
    """The arguments and variables of a batch normalization; `layer.py` says what it does with them."""

    supports_masking = True

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
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
        own_weights: bool = False,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"Unrecognized keyword arguments passed to BatchNormalization: {unknown}")
        if collective is not None and not synchronized:
            raise ValueError("collective= was given, but synchronized=False: such a layer exchanges nothing.")
        if grad_reduction not in ("global", "local"):
            raise ValueError(f"grad_reduction: expected 'global' or 'local', received {grad_reduction!r}.")
        super().__init__(str(name), bool(trainable))
        self.axis = channel_axis(axis)
        self.momentum, self.epsilon = number("momentum", momentum), number("epsilon", epsilon)
        self.center, self.scale = bool(center), bool(scale)
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.moving_mean_initializer = initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = initializers.get(moving_variance_initializer)
        self.beta_regularizer = _regularizer(beta_regularizer)
        self.gamma_regularizer = _regularizer(gamma_regularizer)
        self.beta_constraint = _constraint(beta_constraint)
        self.gamma_constraint = _constraint(gamma_constraint)
        self.renorm, self.renorm_clipping = bool(renorm), renorm_clipping
        self.renorm_momentum = number("renorm_momentum", renorm_momentum)
        self._renorm = Renorm.of(self.renorm_momentum, renorm_clipping) if renorm else None
        self.synchronized = bool(synchronized)
        self.dtype_policy = Policy.of(dtype)
        self.collective, self.grad_reduction, self.own_weights = collective, grad_reduction, bool(own_weights)
        self.built = False
        self.gamma: Variable | None = None
        self.beta: Variable | None = None
        self.ndim = 0
        # The moving statistics, in Keras's order, which is `Moving`'s.
        self._moving: list[Variable] = []
        if name is None:  # last: a refused layer takes no name, or the next one would be called differently elsewhere
            self.name = automatic_name("batch_normalization")

    @property
    def dtype(self) -> str:
        """The name of the variables' dtype."""
        return self.variable_dtype.name

    @property
    def variable_dtype(self) -> np.dtype[Any]:
        """Of gamma, beta and the moving statistics."""
        return self.dtype_policy.variable_dtype

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """Of the output."""
        return self.dtype_policy.compute_dtype

    def __repr__(self) -> str:
        """What tells layers apart; of the other arguments those that differ from their defaults."""
        shown: dict[str, Any] = {
            "name": self.name,
            "channels": self.moving_mean.shape[0] if self.built else None,
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "dtype": self.dtype_policy.name,
        }
        flags = {"center": True, "scale": True, "renorm": False, "synchronized": False, "trainable": True}
        shown |= {name: getattr(self, name) for name, default in flags.items() if getattr(self, name) != default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

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
        shape, dtype = (int(channels),), self.variable_dtype
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
        if self._renorm is not None:
            self._build_renorm(shape, dtype)
        self._moving = [variable for variable in self._variables if not variable.trainable]
        self.ndim = len(tuple(input_shape))
        self.built = True

    def _build_renorm(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Keras's three, which begin where the moving mean and variance do."""
        stddev = np.sqrt(self.moving_variance_initializer(shape, dtype))
        self.moving_stddev = Variable(stddev, "moving_stddev", False)
        self.renorm_mean = Variable(self.moving_mean_initializer(shape, dtype), "renorm_mean", False)
        self.renorm_stddev = Variable(stddev.copy(), "renorm_stddev", False)
        self._variables += [self.moving_stddev, self.renorm_mean, self.renorm_stddev]

    def _axis_of(self, input_shape: Sequence[int | None]) -> int:
        shape = tuple(input_shape)
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"Axis {self.axis} is out of bounds for input shape {shape}. Received: axis={self.axis}")
        return self.axis % len(shape)

    def _pinned_axis(self, shape: tuple[int, ...]) -> int:
        """The channel axis of an input, which must be like the one the layer was built for."""
        axis, channels = self._axis_of(shape), self.moving_mean.shape[0]
        if len(shape) != self.ndim or shape[axis] != channels:
            raise ValueError(
                f"Input of layer {self.name!r} is incompatible with it: expected ndim={self.ndim} and {channels} "
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

    # Configuration

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments in Keras's serialized form.

        `collective`, `grad_reduction` and `own_weights` are no part of it: they concern one run.

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
            "dtype": self.dtype_policy.get_config(),
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
        """The layer that a configuration describes, Keras's own included.

        Of Keras 2's, an axis in a list and keys that Keras 3 does not have are taken, where they change nothing.

        Raises:
            ValueError: an argument is unknown, malformed or not supported.
        """
        return cls(**without_keras_2(config))


# Few layers have one: a process that needs neither module does not load it, 5 ms of a start.


def _regularizer(value: Any) -> Regularizer | None:
    if value is None:
        return None
    from bnlayer import regularizers

    return regularizers.get(value)


def _constraint(value: Any) -> Constraint | None:
    if value is None:
        return None
    from bnlayer import constraints

    return constraints.get(value)
