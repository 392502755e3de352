"""Layers to and from Keras's weights and torch's state dicts, without either framework.

Real Keras and torch stand in `tests/conformance`; here objects with the same methods do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.interchange import from_keras, from_torch, to_keras, to_torch, torch_arguments

POLICIES = ("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


@dataclass
class _Spec:
    ndim: int


class _KerasLayer:
    """A built Keras layer, as far as it is used."""

    def __init__(self, config: dict[str, Any], weights: list[NDArray[Any]], ndim: int | None = 4) -> None:
        self.config, self.weights = config, weights
        if ndim is not None:
            self.input_spec = _Spec(ndim)

    def get_config(self) -> dict[str, Any]:
        return {**self.config, "renorm_clipping": self.config["renorm_clipping"] or {}}

    def get_weights(self) -> list[NDArray[Any]]:
        return self.weights

    def set_weights(self, weights: list[NDArray[Any]]) -> None:
        self.weights = weights


@dataclass
class _Tensor:
    """A torch tensor, as far as it is used: to NumPy it goes detached, from the CPU, and never in bfloat16."""

    values: list[float]
    dtype: str = "torch.float32"
    device: str = "elsewhere"
    attached: bool = True

    def detach(self) -> _Tensor:
        return replace(self, attached=False)

    def cpu(self) -> _Tensor:
        return replace(self, device="cpu")

    def float(self) -> _Tensor:
        return replace(self, dtype="torch.float32")

    def numpy(self) -> NDArray[Any]:
        if (self.dtype, self.device, self.attached) != ("torch.float32", "cpu", False):
            raise TypeError(f"can't convert {self}")
        return np.array(self.values, np.float32)


def _layer(ndim: int = 4, channels: int = 3, **arguments: Any) -> BatchNormalization:
    """A layer whose weights all differ: 1, 2, 3, … and a quarter more in each vector."""
    bn = BatchNormalization(name="bn", **arguments)
    bn.build((channels,) * ndim)
    bn.set_weights([np.arange(1, channels + 1) + i / 4 for i in range(len(bn.weights))])
    return bn


def _state(channels: int = 3, dtype: Any = np.float32, prefix: str = "") -> dict[str, NDArray[Any]]:
    names = ("weight", "bias", "running_mean", "running_var")
    state = {prefix + name: np.arange(1, channels + 1, dtype=dtype) + i for i, name in enumerate(names)}
    return {**state, prefix + "num_batches_tracked": np.array(7)}


# Keras


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("flags", [{}, {"center": False}, {"scale": False}, {"renorm": True}])
@pytest.mark.parametrize("channels", [1, 3])
def test_keras_weights_round_trip_exactly(policy: str, flags: dict[str, bool], channels: int) -> None:
    """Every vector lands where Keras has it, with its bits; the configuration comes along."""
    bn = _layer(axis=1, momentum=0.75, epsilon=1e-5, dtype=policy, channels=channels, **flags)
    keras_layer = _KerasLayer(bn.get_config(), [np.zeros_like(w) for w in bn.get_weights()])
    to_keras(bn, keras_layer)
    assert [w.tobytes() for w in keras_layer.weights] == [w.tobytes() for w in bn.get_weights()]
    copy = from_keras(keras_layer)
    assert {**copy.get_config(), "renorm_clipping": None} == bn.get_config()
    assert [v.name for v in copy.weights] == [v.name for v in bn.weights]
    assert [w.tobytes() for w in copy.get_weights()] == [w.tobytes() for w in bn.get_weights()]
    assert [w.dtype for w in copy.get_weights()] == [w.dtype for w in bn.get_weights()]
    x = np.ones((2, channels, 2, 2))
    assert copy(x).tobytes() == bn(x).tobytes()


def test_keras_arrays_need_a_configuration_and_a_rank() -> None:
    """Neither can be guessed: a wrong rank would be pinned."""
    bn = _layer()
    copy = from_keras(bn.get_weights(), bn.get_config(), ndim=4)
    assert copy(np.ones((1, 2, 2, 3))).tobytes() == bn(np.ones((1, 2, 2, 3))).tobytes()
    with pytest.raises(ValueError, match=r"Arrays were given without config=, which says what they are"):
        from_keras(bn.get_weights())
    with pytest.raises(ValueError, match=r"Layer 'bn': pass ndim=, the rank of its inputs: the source does not tell."):
        from_keras(bn.get_weights(), bn.get_config())
    with pytest.raises(ValueError, match=r"Axis 4 is out of bounds for input shape \(3, 3, 3, 3\)"):
        from_keras(bn.get_weights(), {**bn.get_config(), "axis": 4}, ndim=4)
    with pytest.raises(ValueError, match=r"a rank of the inputs between 1 and 64, received ndim=0"):
        from_keras(bn.get_weights(), bn.get_config(), ndim=0)


KERAS_2 = {
    "name": "bn",
    "trainable": True,
    "batch_input_shape": [None, 8, 8, 3],
    "dtype": {"class_name": "Policy", "config": {"name": "mixed_float16"}},
    "axis": [3],
    "momentum": 0.9,
    "epsilon": 0.001,
    "center": True,
    "scale": True,
    "beta_initializer": {"class_name": "Zeros", "config": {}},
    "gamma_initializer": {"class_name": "Ones", "config": {}},
    "moving_mean_initializer": {"class_name": "Zeros", "config": {}},
    "moving_variance_initializer": {"class_name": "Ones", "config": {}},
    "beta_regularizer": None,
    "gamma_regularizer": {"class_name": "L2", "config": {"l2": 0.25}},
    "beta_constraint": None,
    "gamma_constraint": {"class_name": "MaxNorm", "config": {"max_value": 2, "axis": 0}},
    "renorm": False,
    "fused": None,
    "virtual_batch_size": None,
    "adjustment": None,
}


def test_keras_2s_configurations_are_taken() -> None:
    """An axis in a list, keys that say nothing, its policy; the shape of a first layer says the rank."""
    layer = from_keras([np.arange(1.0, 4)] * 4, KERAS_2)
    assert (layer.axis, layer.ndim, layer.momentum, layer.dtype_policy.name) == (3, 4, 0.9, "mixed_float16")
    assert layer.losses == [0.25 * 14]
    assert BatchNormalization.from_config({**KERAS_2, "fused": True}).get_config() == layer.get_config()
    ours = _layer(axis=3)
    to_keras(ours, target := _KerasLayer({**ours.get_config(), "axis": [3]}, ours.get_weights()))
    assert [w.tobytes() for w in target.weights] == [w.tobytes() for w in ours.get_weights()]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("axis", [1, 2], r"axis: expected an integer, or a list of one, received \[1, 2\]\."),
        ("axis", [], r"axis: expected an integer, or a list of one, received \[\]\."),
        ("virtual_batch_size", 32, "Unrecognized keyword arguments passed to BatchNormalization: .*size': 32}"),
        ("adjustment", "f", "Unrecognized keyword arguments passed to BatchNormalization: .*adjustment': 'f'}"),
    ],
)
def test_what_keras_2_alone_can_do_is_refused(key: str, value: Any, text: str) -> None:
    """By its name."""
    with pytest.raises(ValueError, match=text):
        BatchNormalization.from_config({**KERAS_2, key: value})


@pytest.mark.parametrize("source", [{"axis": -1}, None, np.ones((4, 3)), "layer"])
def test_what_is_neither_a_keras_layer_nor_its_weights_is_refused(source: Any) -> None:
    """A configuration above all: there is a function for it."""
    with pytest.raises(ValueError) as caught:
        from_keras(source, {})
    assert str(caught.value) == (
        "from_keras: expected a Keras layer, or the list of arrays of its get_weights() with config=, received a "
        f"{type(source).__name__}. Of a configuration alone, BatchNormalization.from_config(config) makes a layer."
    )


def test_a_keras_layer_that_is_not_built_gives_one_that_is_not() -> None:
    """Its variables come with its first inputs."""
    layer = from_keras(_KerasLayer(BatchNormalization(epsilon=0.5).get_config(), [], ndim=None))
    assert (layer.built, layer.epsilon) == (False, 0.5)


def test_keras_weights_that_do_not_fit_are_refused() -> None:
    """Number, shapes and dtypes, with both sides in the text."""
    bn = _layer()
    config, weights = bn.get_config(), bn.get_weights()
    with pytest.raises(ValueError, match=r"expected 4 weights \(gamma\(3,\), .* received 3 of shapes"):
        from_keras(weights[:3], config, ndim=2)
    with pytest.raises(
        ValueError, match=r"real vectors of one length as weights, received float32\(3,\), float64\(2,\)"
    ):
        from_keras([weights[0], np.zeros(2), *weights[2:]], config, ndim=2)
    with pytest.raises(ValueError, match=r"real vectors of one length as weights, received float32\(1, 3\)"):
        from_keras([w[None] for w in weights], config, ndim=2)
    with pytest.raises(ValueError, match=r"real vectors of one length as weights, received complex64\(3,\)"):
        from_keras([w.astype(np.complex64) for w in weights], config, ndim=2)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"epsilon": 0.5}, "epsilon=0.5 where 0.001 is expected"),
        ({"momentum": 0.5}, "momentum=0.5 where 0.99 is expected"),
        ({"axis": 1}, "axis=1 where 3 is expected"),
        ({"renorm": True}, "renorm=True where None is expected; shapes="),
        ({"center": False}, "center=None where True is expected"),
    ],
)
def test_weights_do_not_go_into_another_keras_layer(other: dict[str, Any], text: str) -> None:
    """With the same weights it would compute something else; nothing is assigned."""
    bn = _layer()
    target = _layer(**other)
    keras_layer = _KerasLayer(target.get_config(), target.get_weights())
    with pytest.raises(ValueError, match="Layer 'bn': the Keras layer is another one: ") as caught:
        to_keras(bn, keras_layer)
    assert text in str(caught.value)
    assert [w.tobytes() for w in keras_layer.weights] == [w.tobytes() for w in target.get_weights()]


def test_to_keras_needs_two_built_layers() -> None:
    """Each says which one is not; and axis -1 of rank 4 is axis 3."""
    bn = _layer(axis=3)
    with pytest.raises(
        ValueError, match=r"Layer 'bn': the Keras layer has no weights yet: call its build\(input_shape\)\."
    ):
        to_keras(bn, _KerasLayer(bn.get_config(), [], ndim=None))
    with pytest.raises(ValueError, match=r"another one: ndim=2 where 4 is expected; axis=1 where 3 is expected\."):
        to_keras(bn, _KerasLayer({**bn.get_config(), "axis": -1}, bn.get_weights(), ndim=2))
    fresh = BatchNormalization(name="fresh")
    with pytest.raises(ValueError, match=r"Layer 'fresh' has no weights yet: call it once, or build\(input_shape\)."):
        to_keras(fresh, _KerasLayer(fresh.get_config(), []))
    to_keras(bn, _KerasLayer(_layer().get_config(), bn.get_weights()))


# torch


@pytest.mark.parametrize(
    ("dtype", "policy"),
    [(np.float32, "float32"), (np.float64, "float64"), (np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_torch_state_becomes_a_layer(dtype: Any, policy: str, channels: int) -> None:
    """Names, values and dtype exactly; momentum is turned round; the count is the version."""
    state = _state(channels, dtype)
    bn = from_torch(state, ndim=4, eps=1e-4, momentum=0.25, name="bn")
    assert (bn.dtype, bn.axis, bn.momentum, bn.epsilon, bn.name) == (policy, 1, 0.75, 1e-4, "bn")
    assert [w.tobytes() for w in bn.get_weights()] == [v.tobytes() for v in list(state.values())[:4]]
    assert bn.state.version == 7
    assert bn(np.ones((2, channels, 3, 3))).shape == (2, channels, 3, 3)
    assert torch_arguments(bn) == {"num_features": channels, "eps": 1e-4, "momentum": 0.25, "affine": True}
    exported = to_torch(bn)
    assert list(exported) == list(state)
    kind = np.float32 if policy == "bfloat16" else dtype
    assert [exported[key].dtype for key in exported] == [np.dtype(kind)] * 4 + [np.dtype(np.int64)]
    assert all(np.array_equal(exported[key], state[key]) for key in state)
    assert exported["num_batches_tracked"].shape == ()


def test_the_defaults_are_torchs() -> None:
    """epsilon 1e-5 and momentum 0.1 there; here that is 0.9."""
    bn = from_torch(_state(), ndim=2)
    assert (bn.epsilon, bn.momentum, bn.synchronized) == (1e-5, 0.9, False)
    assert from_torch(_state(), ndim=3, synchronized=True, axis=-1, dtype="mixed_float16").get_config()["axis"] == -1


def test_a_prefix_picks_one_module() -> None:
    """Its dot is part of it, as in torch; other modules' entries are not looked at."""
    model = {"conv.weight": np.zeros((3, 2)), **_state(prefix="layer1.0.bn1."), **_state(prefix="bn2.")}
    bn = from_torch(model, ndim=4, prefix="layer1.0.bn1.")
    assert list(to_torch(bn, prefix="layer1.0.bn1.")) == [key for key in model if key.startswith("layer1")]
    text = (
        r"prefix='bn1': expected weight, bias, .* received nothing. .* under: 'layer1.0.bn1.', 'bn2.'. .*has no running"
    )
    with pytest.raises(ValueError, match=text):
        from_torch(model, ndim=4, prefix="bn1")
    with pytest.raises(ValueError, match=r"prefix='': expected weight, .*, received bn2.bias, .*, conv.weight"):
        from_torch(model, ndim=4)


def test_affine_false_is_neither_center_nor_scale() -> None:
    """And back."""
    state = {key: value for key, value in _state().items() if key not in ("weight", "bias")}
    bn = from_torch(state, ndim=2)
    assert (bn.center, bn.scale, torch_arguments(bn)["affine"]) == (False, False, False)
    assert list(to_torch(bn)) == ["running_mean", "running_var", "num_batches_tracked"]


def test_one_of_center_and_scale_is_filled_up_for_torch() -> None:
    """With what changes nothing: weight 1, bias 0. Without a bias torch's own state has the scale alone."""
    scaled, centered = to_torch(_layer(center=False)), to_torch(_layer(scale=False))
    assert (scaled["weight"].tolist(), scaled["bias"].tolist()) == ([1, 2, 3], [0, 0, 0])
    assert (centered["weight"].tolist(), centered["bias"].tolist()) == ([1, 1, 1], [1, 2, 3])
    assert scaled["bias"].dtype == centered["weight"].dtype == np.float32
    assert torch_arguments(_layer(center=False))["affine"] is True
    del scaled["bias"]
    bn = from_torch(scaled, ndim=2)
    assert (bn.center, bn.scale) == (False, True)


def test_what_torch_has_and_we_do_not_is_refused() -> None:
    """The cumulative average, and no running statistics at all; a missing count is 0, as torch reads it."""
    with pytest.raises(ValueError, match=r"momentum=None is torch's cumulative average .* no counterpart here"):
        from_torch(_state(), ndim=2, momentum=None)
    bare = {key: value for key, value in _state().items() if key in ("weight", "bias")}
    with pytest.raises(ValueError, match=r"received bias, weight\. .*track_running_stats=False has no running"):
        from_torch(bare, ndim=2)
    old = _state()
    del old["num_batches_tracked"]
    assert from_torch(old, ndim=2).state.version == 0


def test_what_we_have_and_torch_does_not_is_refused() -> None:
    """Renorm; and a layer without variables has no state."""
    with pytest.raises(ValueError, match=r"Layer 'bn': torch has no counterpart of renorm\. For inference alone, take"):
        to_torch(_layer(renorm=True))
    for ask in (to_torch, torch_arguments):
        with pytest.raises(ValueError, match="Layer 'fresh' has no state yet: call it once"):
            ask(BatchNormalization(name="fresh"))


def test_torch_states_that_do_not_fit_are_refused() -> None:
    """Shapes and dtypes, named by their key."""
    with pytest.raises(ValueError, match=r"'bn.bias': expected shape \(3,\), received \(2,\)"):
        from_torch({**_state(prefix="bn."), "bn.bias": np.zeros(2)}, ndim=2, prefix="bn.")
    with pytest.raises(ValueError, match=r"'num_batches_tracked': expected shape \(\), received \(2,\)"):
        from_torch({**_state(), "num_batches_tracked": np.zeros(2)}, ndim=2)
    with pytest.raises(ValueError, match=r"'weight': expected shape \(channels,\), received \(\)"):
        from_torch({key: np.array(1.0) for key in _state()}, ndim=2)
    mixed = {**_state(), "weight": np.ones(3, np.float16)}
    with pytest.raises(ValueError, match=r"one dtype of float32, .*, received float16, float32\. Pass dtype="):
        from_torch(mixed, ndim=2)
    assert from_torch(mixed, ndim=2, dtype="float32").dtype == "float32"
    with pytest.raises(ValueError, match=r"one dtype of float32, .*, received int64\. Pass dtype="):
        from_torch(_state(dtype=np.int64), ndim=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_of_any_device_are_accepted(dtype: str) -> None:
    """Detached and copied to the CPU; bfloat16, which NumPy can't take from torch, by way of float32."""
    names = ("weight", "bias", "running_mean", "running_var")
    state = {name: _Tensor([1.5, i + 0.25], f"torch.{dtype}") for i, name in enumerate(names)}
    bn = from_torch(state, ndim=2)
    assert bn.dtype == dtype
    assert [w.astype(np.float64).tolist() for w in bn.get_weights()] == [[1.5, i + 0.25] for i in range(4)]


def test_a_module_is_no_state_dict() -> None:
    """Its eps and momentum are not in the state dict: the text shows the whole call."""

    class BatchNorm2d:
        def state_dict(self) -> dict[str, NDArray[Any]]:
            return _state()

    with pytest.raises(ValueError) as caught:
        from_torch(BatchNorm2d())  # type: ignore[arg-type]
    assert str(caught.value) == (
        "from_torch: expected a state dict, received the module BatchNorm2d: pass its state_dict(), with its eps and "
        "momentum, which are not in there: from_torch(module.state_dict(), ndim=…, eps=module.eps, "
        "momentum=module.momentum)."
    )
    with pytest.raises(ValueError, match=r"from_torch: expected the state dict of a module, received \[1, 2\]\."):
        from_torch([1, 2])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"expected ndim=, the rank of the inputs, which a state dict does not hold: 2"
    ):
        from_torch(_state())


@pytest.mark.parametrize("count", [np.array(7), np.array([7]), np.array([[7]])])
def test_the_count_of_batches_may_be_a_vector_of_one(count: NDArray[Any]) -> None:
    """As some writers of files leave it."""
    assert from_torch({**_state(), "num_batches_tracked": count}, ndim=2).state.version == 7
    with pytest.raises(ValueError, match=r"'num_batches_tracked': expected shape \(\), received \(2,\)"):
        from_torch({**_state(), "num_batches_tracked": np.zeros(2, np.int64)}, ndim=2)


def test_torchs_numbers_are_refused_by_their_names() -> None:
    """As the caller wrote them: `eps`, not epsilon."""
    with pytest.raises(ValueError, match=r"eps: expected a number, received 'a'\."):
        from_torch(_state(), ndim=2, eps="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"momentum: expected a number, received 'a'\."):
        from_torch(_state(), ndim=2, momentum="a")  # type: ignore[arg-type]
