"""A multi-layer perceptron on NumPy whose batch normalization sees the batches of all ranks.

    x ─ [Dense ─ BatchNormalization ─ ReLU] × hidden ─ Dense ─ softmax cross-entropy

A Dense layer before a normalization has no bias: the normalization would subtract it; its β is the bias.

Shape suffixes: B rows of this rank, I inputs, O outputs, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.constraints import Constraint
from bnlayer.regularizers import Regularizer
from bnlayer.state import LayerState
from bnlayer.variable import Variable
from bnworker.train import penalties
from bnworker.train.settings import Settings


@dataclass(frozen=True, slots=True)
class Normalization:
    """Arguments of the model's `BatchNormalization` layers, with the layer's own defaults."""

    momentum: float = 0.99
    epsilon: float = 1e-3
    gamma_regularizer: Regularizer | None = None
    beta_regularizer: Regularizer | None = None
    gamma_constraint: Constraint | None = None
    beta_constraint: Constraint | None = None


class Dense:
    """y = x·kernel + bias.

    Args:
        inputs, outputs: I and O.
        generator: draws the kernel: normal, of variance 2/I, which keeps the scale through a ReLU.
        dtype: of the weights.
        bias: whether the layer has one.

    Source of the variance: He et al., "Delving Deep into Rectifiers" (2015).
    """

    def __init__(
        self, inputs: int, outputs: int, generator: np.random.Generator, *, dtype: str, bias: bool, name: str
    ) -> None:
        drawn = generator.standard_normal((inputs, outputs)) * np.sqrt(2.0 / inputs)
        self.name = name
        self.kernel = Variable(drawn.astype(dtype), "kernel", True)
        self.bias = Variable(np.zeros(outputs, dtype), "bias", True) if bias else None
        self._x_BI: NDArray[Any] | None = None

    def __repr__(self) -> str:
        inputs, outputs = self.kernel.shape
        return f"Dense(name={self.name!r}, inputs={inputs}, outputs={outputs}, bias={self.bias is not None})"

    @property
    def weights(self) -> list[Variable]:
        """The kernel, and the bias if there is one."""
        return [self.kernel] if self.bias is None else [self.kernel, self.bias]

    def __call__(self, x_BI: NDArray[Any], training: bool) -> NDArray[Any]:
        """The outputs, (B, O); in training the inputs are kept for `backward`."""
        self._x_BI = x_BI if training else None
        y_BO: NDArray[Any] = x_BI @ self.kernel.value
        return y_BO if self.bias is None else y_BO + self.bias.value

    def backward(self, dy_BO: NDArray[Any]) -> NDArray[Any]:
        """dx = dy·kernelᵀ; sets this rank's share of the weights' gradients: dkernel = xᵀ·dy, dbias = Σ dy."""
        assert self._x_BI is not None, "backward belongs to a training call"
        self.kernel.gradient = self._x_BI.T @ dy_BO
        if self.bias is not None:
            self.bias.gradient = dy_BO.sum(axis=0)
        dx_BI: NDArray[Any] = dy_BO @ self.kernel.value.T
        return dx_BI


class Perceptron:
    """The model of the main job.

    Args:
        features: D, the columns of the inputs.
        hidden: outputs of each hidden layer.
        classes: K.
        dtype: "float32" or "float64", of weights and arithmetic.
        seed: the same seed gives the same weights on every rank.
        normalization: of every layer but the last.

    Attributes:
        dense: the Dense layers, in order; their gradients are this rank's share.
        norms: the normalizations, in order; their gradients are those of all ranks already.
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        classes: int,
        *,
        dtype: str,
        seed: int,
        normalization: Normalization = Normalization(),
    ) -> None:
        generator = np.random.default_rng([seed])
        sizes = [features, *hidden, classes]
        self.dense = [
            Dense(i, o, generator, dtype=dtype, bias=number == len(hidden) + 1, name=f"dense_{number}")
            for number, (i, o) in enumerate(pairwise(sizes), 1)
        ]
        self.norms = [
            BatchNormalization(
                synchronized=True,
                name=f"bn_{number}",
                dtype=dtype,
                momentum=normalization.momentum,
                epsilon=normalization.epsilon,
                gamma_regularizer=normalization.gamma_regularizer,
                beta_regularizer=normalization.beta_regularizer,
                gamma_constraint=normalization.gamma_constraint,
                beta_constraint=normalization.beta_constraint,
            )
            for number in range(1, len(hidden) + 1)
        ]
        for norm, size in zip(self.norms, hidden, strict=True):
            norm.build((None, size))
        self._active: list[NDArray[np.bool_]] = []

    def __repr__(self) -> str:
        features, (*hidden, classes) = self.dense[0].kernel.shape[0], (dense.kernel.shape[1] for dense in self.dense)
        return f"Perceptron(features={features}, hidden={hidden}, classes={classes})"

    @property
    def dense_weights(self) -> list[Variable]:
        """Kernels and biases, in order."""
        return [weight for layer in self.dense for weight in layer.weights]

    @property
    def norm_weights(self) -> list[Variable]:
        """Gammas and betas, in order."""
        return [weight for layer in self.norms for weight in layer.trainable_weights]

    def named_weights(self) -> dict[str, Variable]:
        """Every trainable weight by "layer/weight"."""
        named = {f"{dense.name}/{weight.name}": weight for dense in self.dense for weight in dense.weights}
        named |= {f"{norm.name}/{weight.name}": weight for norm in self.norms for weight in norm.trainable_weights}
        return named

    def tensors(self, version: int) -> dict[str, NDArray[Any]]:
        """All weights and layer states by name: "dense_1/kernel", "bn_1/gamma", "bn_1/state/moving_mean", ….

        They are the model's arrays, not copies; the model replaces its arrays and never writes to them.

        Args:
            version: of the layers' states. The owner's own version is not used, because it also counts replacements, so
                a resumed run would have a higher one.
        """
        named: dict[str, NDArray[Any]] = {name: weight.value for name, weight in self.named_weights().items()}
        for norm in self.norms:
            state = replace(norm.state, version=version)
            named |= {f"{norm.name}/state/{name}": array for name, array in state.arrays().items()}
        return named

    def load(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Load what `tensors` returned; every name must be present, with the right shape and dtype."""
        for name, weight in self.named_weights().items():
            weight.assign(tensors[name])
        for norm in self.norms:
            own = {name: tensors[f"{norm.name}/state/{name}"] for name in norm.state.arrays()}
            norm.restore(LayerState.from_arrays(own, norm.dtype))

    def begin(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Load initial weights and moving statistics ("bn_1/moving_mean", …), rounded to the model's dtype.

        Args:
            tensors: every trainable weight and moving statistic by its name, with the right shape.
        """
        for name, weight in self.named_weights().items():
            weight.assign(tensors[name])
        for norm in self.norms:
            for statistics in (norm.moving_mean, norm.moving_variance):
                statistics.assign(tensors[f"{norm.name}/{statistics.name}"])

    def __call__(self, x_BD: NDArray[Any], training: bool = False) -> NDArray[Any]:
        """The logits, (B, K)."""
        self._active = []
        h = x_BD
        for dense, norm in zip(self.dense, self.norms, strict=False):
            h = norm(dense(h, training), training=training)
            active = h > 0
            if training:
                self._active.append(active)
            h = h * active
        return self.dense[-1](h, training)

    def backward(self, dlogits_BK: NDArray[Any]) -> None:
        """Set every weight's gradient from the gradient of the logits, (B, K)."""
        dh = self.dense[-1].backward(dlogits_BK)
        for dense, norm, active in zip(self.dense[-2::-1], self.norms[::-1], self._active[::-1], strict=True):
            dh = dense.backward(norm.backward(dh * active))


def cross_entropy(logits_BK: NDArray[Any], labels_B: NDArray[np.int64]) -> tuple[float, NDArray[Any]]:
    """The summed cross-entropy of softmax(logits), and its gradient.

        loss = Σ_B log Σ_k exp(z_k) − z_label        gradient = softmax(z) − onehot(label)

    Args:
        logits_BK: (B, K); B may be 0.
        labels_B: (B,), from 0 to K − 1.

    Returns:
        The sum over the rows, not their mean, computed in the logits' dtype and added in float64; its gradient, (B, K).
    """
    shifted_BK = logits_BK - logits_BK.max(axis=1, keepdims=True, initial=-np.inf)
    exp_BK = np.exp(shifted_BK)
    total_B = exp_BK.sum(axis=1)
    rows = np.arange(len(labels_B))
    loss_B = np.log(total_B) - shifted_BK[rows, labels_B]
    gradient_BK = exp_BK / total_B[:, None]
    gradient_BK[rows, labels_B] -= 1
    return float(loss_B.sum(dtype=np.float64)), gradient_BK


def perceptron(settings: Settings, features: int, classes: int) -> Perceptron:
    """The model that the settings describe.

    Raises:
        ValueError: a regularizer's or constraint's name is unknown.
    """
    normalization = Normalization(
        momentum=settings.bn_momentum,
        epsilon=settings.epsilon,
        gamma_regularizer=penalties.regularizer(settings.gamma_regularizer),
        beta_regularizer=penalties.regularizer(settings.beta_regularizer),
        gamma_constraint=penalties.constraint(settings.gamma_constraint),
        beta_constraint=penalties.constraint(settings.beta_constraint),
    )
    return Perceptron(
        features, settings.hidden, classes, dtype=settings.dtype, seed=settings.seed, normalization=normalization
    )
