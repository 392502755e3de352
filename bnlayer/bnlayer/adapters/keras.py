"""Keras 3's BatchNormalization, whose `synchronized=True` works in `fit()` on the torch, jax and tensorflow backends.

    from bnlayer.adapters.keras import BatchNormalization, convert, reduce_gradients

    model = convert(model)                                      # or: BatchNormalization(synchronized=True) in a new one
    model.compile(reduce_gradients(keras.optimizers.Adam()), ...)

Unsynchronized, and in inference, it is Keras's layer. A synchronized training call exchanges with the other ranks,
forward and backward, in the order of the program: on JAX by ordered callbacks, in a `tf.function` as a stateful
operation. Each backend's part is a function below, which imports the backend when it is first called. See
`docs/adapters-keras.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, proxy, ref

import keras
import ml_dtypes
import numpy as np

from bnlayer.adapters import host
from bnlayer.adapters.host import HostLayer, Reduction

__all__ = ["BatchNormalization", "convert", "reduce_gradients", "revert"]

T = TypeVar("T")

_MOVING = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")

_links: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by graph of TensorFlow: see `_tensorflow`

# Takes the layer, the batch, its weights and moving statistics, and a mask or None; returns y and the new statistics.
Normalize = Callable[[HostLayer, Any, Sequence[Any], Sequence[Any], Any], tuple[Any, Sequence[Any]]]


@keras.saving.register_keras_serializable("bnlayer")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras's layer, with its arguments, weights and configuration; `synchronized=True` on every backend.

    Ranks know a layer by its name. Gradients are those of the SUM over ranks of the local losses; for gamma and beta,
    as for every other weight, this rank's share: see `reduce_gradients`.

    Args:
        *args, **kwargs: Keras's.
        synchronized: whether training uses the statistics of all ranks' batches, which need not be of one size.

    Raises:
        ValueError: Keras refuses an argument.
    """

    _host: HostLayer | None = None

    def __init__(self, *args: Any, synchronized: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, synchronized=False, **kwargs)  # on other backends than TensorFlow, Keras refuses True
        _set_synchronized(self, synchronized)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize a batch; see `keras.layers.BatchNormalization`.

        Raises:
            ValueError: the mask has not one dimension less than the inputs, or the backend can't train.
            RuntimeError: synchronized, and several ranks are announced, but no world was joined.
            CollectiveError: an exchange could not complete. A compiled program raises its framework's own error, whose
                text holds that of the `CollectiveError`.
        """
        if not (self.synchronized and training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        if mask is not None:
            if len(mask.shape) != len(inputs.shape) - 1:
                raise ValueError(
                    "The mask provided should be one dimension less than the inputs. "
                    f"Received: mask.shape={mask.shape}, inputs.shape={inputs.shape}"
                )
            mask = keras.ops.cast(mask, "bool")
        x = keras.ops.cast(inputs, self.compute_dtype)
        weights = [keras.ops.convert_to_tensor(w) for w in (self.gamma, self.beta) if w is not None]
        variables = [getattr(self, name) for name in _MOVING[: 5 if self.renorm else 2]]
        moving = [keras.ops.convert_to_tensor(variable) for variable in variables]
        normalize = _of_backend(_NORMALIZE)
        y, moved = normalize(self._host_layer(x, moving[0]), x, weights, moving, mask)
        for variable, value in zip(variables, moved, strict=True):
            variable.assign(value)
        return y

    def _host_layer(self, x: Any, mean: Any) -> HostLayer:
        """What holds the grids and the enrolment with the ranks."""
        if self._host is None:
            # The tensors' own dtypes: JAX computes a float64 policy in float32 unless it was told otherwise.
            dtypes = (keras.backend.standardize_dtype(tensor.dtype) for tensor in (x, mean))
            self._host = HostLayer(
                name=self.name,
                axis=self.axis,
                center=self.center,
                scale=self.scale,
                renorm=self.renorm,
                renorm_clipping=self.renorm_clipping,
                renorm_momentum=self.renorm_momentum,
                dtype=host.policy_name(*dtypes),
            )
        self._host.momentum, self._host.epsilon = self.momentum, self.epsilon
        shape: list[Any] = [None] * len(x.shape)
        shape[self.axis] = mean.shape[0]
        self._host.expect(shape)
        return self._host


def convert(model: T) -> T:
    """Make every BatchNormalization of a model, nested ones included, a synchronized one of ours, in place.

    Weights, names, and what refers to them, an optimizer for example, stay as they are. Subclasses of Keras's layer are
    left alone.

    Returns:
        The model.
    """
    for layer in _layers(model):
        if type(layer) is keras.layers.BatchNormalization:
            layer.__class__ = BatchNormalization
        if type(layer) is BatchNormalization:
            _set_synchronized(layer, True)
    return _recompiled(model)


def revert(model: T) -> T:
    """The way back from `convert`: Keras's own layers, unsynchronized, whose saved files need nothing of ours.

    Returns:
        The model, changed in place.
    """
    for layer in _layers(model):
        if type(layer) is BatchNormalization:
            _set_synchronized(layer, False)
            layer.__dict__.pop("_host", None)
            layer.__class__ = keras.layers.BatchNormalization
    return _recompiled(model)


def reduce_gradients(optimizer: T, op: Reduction = "mean") -> T:
    """Make an optimizer reduce its gradients over all ranks first, in place; its saved configuration stays its own.

        model.compile(reduce_gradients(keras.optimizers.SGD(0.1)), ...)

    With mixed_float16, wrap the `LossScaleOptimizer`, not what it wraps, so that all ranks scale alike.

    Args:
        optimizer: of Keras.
        op: "mean" for losses that are means over equal shards; "sum" for losses that are shares of a global one.

    Returns:
        The optimizer.

    Raises:
        ValueError: op is neither.
    """
    host.reducing(op)
    names = ["apply"]
    if type(optimizer).stateless_apply is not keras.optimizers.Optimizer.stateless_apply:  # type: ignore[attr-defined]
        names.append("stateless_apply")  # a LossScaleOptimizer's does not go through its apply
    for name in names:
        setattr(optimizer, name, _reducing_first(getattr(optimizer, name), name == "stateless_apply", op))
    return optimizer


def _reducing_first(function: Callable[..., Any], stateless: bool, op: Reduction) -> Callable[..., Any]:
    @wraps(function)
    def reduced(*args: Any, **kwargs: Any) -> Any:
        if "grads" in kwargs:
            return function(*args, **{**kwargs, "grads": _reduced(kwargs["grads"], op)})
        before, gradients, after = args[:stateless], args[int(stateless)], args[stateless + 1 :]
        return function(*before, _reduced(gradients, op), *after, **kwargs)

    return reduced


def _reduced(gradients: Sequence[Any], op: Reduction) -> list[Any]:
    present = [gradient for gradient in gradients if gradient is not None]
    if not present or host.reducing(op) is None:
        return list(gradients)
    totals = iter(_of_backend(_REDUCE)(present, op))
    return [None if gradient is None else next(totals) for gradient in gradients]


def _layers(model: Any) -> list[Any]:
    return list(model._flatten_layers())  # noqa: SLF001 - `layers` shows one level; Keras has no public way to all


def _set_synchronized(layer: Any, synchronized: bool) -> None:
    layer.synchronized = bool(synchronized)
    if keras.backend.backend() == "tensorflow":
        layer.supports_jit = not synchronized  # XLA does not compile a call to the host


def _recompiled(model: T) -> T:
    """Drop what was traced with the layers as they were."""
    if getattr(model, "compiled", False):
        model.train_function = None  # type: ignore[attr-defined]
        if keras.backend.backend() == "tensorflow":
            model.jit_compile = False  # type: ignore[attr-defined]
    return model


# ---- the backends ----


def _of_backend(functions: dict[str, T]) -> T:
    backend = keras.backend.backend()
    if backend not in functions:
        raise ValueError(f"Expected one of the backends {', '.join(functions)} for this, received {backend!r}.")
    return functions[backend]


def _numpy(
    layer: HostLayer, x: Any, weights: Sequence[Any], moving: Sequence[Any], mask: Any
) -> tuple[Any, Sequence[Any]]:
    y, moved, _ = layer.forward(x, weights, moving, mask)
    return y, moved


def _jax(
    layer: HostLayer, x: Any, weights: Sequence[Any], moving: Sequence[Any], mask: Any
) -> tuple[Any, Sequence[Any]]:
    from bnlayer.adapters.jax import call

    y, moved = call(ref(layer), x, tuple(weights), tuple(moving), mask)
    return y, moved


def _jax_reduce(gradients: list[Any], op: Reduction) -> list[Any]:
    from bnlayer.adapters.jax import allreduce

    return list(allreduce(gradients, op))


def _tensorflow(
    layer: HostLayer, x: Any, weights: Sequence[Any], moving: Sequence[Any], mask: Any
) -> tuple[Any, Sequence[Any]]:
    import tensorflow as tf

    graph = _graph_of_tensorflow()
    x, link, *tensors = map(tf.convert_to_tensor, [x, _links.get(graph, 0.0), *weights, *moving])
    rest = [*tensors[len(weights) :], *([] if mask is None else [mask])]  # a variable's value is a variable: not these
    host_layer = proxy(layer)  # TensorFlow keeps functions of graphs that nobody holds any more, and their layer's name

    def forward(x: Any, *arrays: Any) -> list[Any]:
        gammas, others = arrays[: len(weights)], arrays[len(weights) :]
        y, moved, saved = host_layer.forward(x, gammas, others[: len(moving)], *others[len(moving) :])
        return [y, *moved, saved]

    def backward(x: Any, dy: Any, saved: Any, *masks: Any) -> list[Any]:
        dx, gradients = host_layer.pull_back(x, masks[0] if masks else None, dy, saved)
        return [dx, *gradients]

    @tf.custom_gradient
    def normalize(x: Any, link: Any, *weights: Any) -> Any:
        kinds = [x.dtype, *(vector.dtype for vector in moving), tf.float64]
        y, *moved, saved = tf.numpy_function(forward, [x, *weights, *rest], kinds)

        def gradient(dy: Any, dlink: Any, *_: Any) -> Any:
            kinds = [x.dtype, *(weight.dtype for weight in weights)]
            results = tf.numpy_function(backward, [x, dy, saved, *rest[len(moving) :]], kinds)
            dx, *gradients = _shaped(results, [x, *weights])
            return (dx, dlink, *gradients)

        return (*_shaped([y], [x]), tf.identity(link), *_shaped(moved, moving)), gradient

    # A tape goes back through parallel branches in an order of its own. Each call takes a number from the call before
    # and hands it on, so that they are pulled back in the reverse order of the program, as in every other framework.
    y, _links[graph], *moved = normalize(x, link, *tensors[: len(weights)])
    return y, moved


def _graph_of_tensorflow() -> Any:
    """What is being traced; TensorFlow's context when nothing is."""
    import tensorflow as tf

    return tf.compat.v1.get_default_graph() if not tf.executing_eagerly() else tf


def _tensorflow_reduce(gradients: list[Any], op: Reduction) -> list[Any]:
    import tensorflow as tf

    def reduce(*arrays: Any) -> list[Any]:
        return list(host.allreduce(arrays, op))

    dense = [tf.convert_to_tensor(gradient) for gradient in gradients]
    return _shaped(tf.numpy_function(reduce, dense, [gradient.dtype for gradient in dense]), dense)


def _shaped(tensors: Any, like: Sequence[Any]) -> list[Any]:
    """What a call to the host returns has no static shape."""
    tensors = list(tensors) if isinstance(tensors, list | tuple) else [tensors]
    for tensor, other in zip(tensors, like, strict=True):
        tensor.set_shape(other.shape)
    return tensors


def _torch(
    layer: HostLayer, x: Any, weights: Sequence[Any], moving: Sequence[Any], mask: Any
) -> tuple[Any, Sequence[Any]]:
    if x.device.type == "meta":  # Keras asks for shapes
        return x.clone(), moving
    y, *moved = _torch_function().apply(layer, x, mask, len(weights), *weights, *moving)
    return y, moved


def _torch_reduce(gradients: list[Any], op: Reduction) -> list[Any]:
    totals = host.allreduce([_from_torch(gradient) for gradient in gradients], op)
    return [_to_torch(total, gradient) for total, gradient in zip(totals, gradients, strict=True)]


@cache
def _torch_function() -> Any:
    import torch

    class Synchronized(torch.autograd.Function):
        """A training call with its gradient."""

        @staticmethod
        def forward(ctx: Any, layer: HostLayer, x: Any, mask: Any, weights: int, *vectors: Any) -> Any:
            arrays = [_from_torch(vector) for vector in vectors]
            batch, truth = _from_torch(x), None if mask is None else _from_torch(mask)
            y, moved, saved = layer.forward(batch, arrays[:weights], arrays[weights:], truth)
            ctx.save_for_backward(x, mask)
            ctx.layer, ctx.statistics, ctx.saved = layer, len(moved), saved
            statistics = [_to_torch(vector, old) for vector, old in zip(moved, vectors[weights:], strict=True)]
            ctx.mark_non_differentiable(*statistics)
            return _to_torch(y, x), *statistics

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, dy: Any, *_: Any) -> Any:
            x, mask = ctx.saved_tensors
            truth = None if mask is None else _from_torch(mask)
            dx, gradients = ctx.layer.pull_back(_from_torch(x), truth, _from_torch(dy), ctx.saved)
            tensors = [_to_torch(gradient, x) for gradient in gradients]
            return None, _to_torch(dx, x), None, None, *tensors, *[None] * ctx.statistics

    return Synchronized


def _from_torch(tensor: Any) -> Any:
    """A tensor's array, without a copy where it lies in the host's memory; NumPy knows bfloat16 by its bits alone."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(array: Any, like: Any) -> Any:
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(like.device)
    return torch.from_numpy(array).to(like.device)


_NORMALIZE: dict[str, Normalize] = {"torch": _torch, "jax": _jax, "tensorflow": _tensorflow, "numpy": _numpy}
_REDUCE: dict[str, Callable[[list[Any], Reduction], list[Any]]] = {
    "torch": _torch_reduce,
    "jax": _jax_reduce,
    "tensorflow": _tensorflow_reduce,
}
