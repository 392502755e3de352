"""Layers to and from real Keras layers and real torch modules: values exactly, outputs to rounding."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.interchange import fold, fold_following, from_keras, from_torch, to_keras, to_torch, torch_arguments

pytestmark = pytest.mark.keras

POLICIES = ("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
FLAGS: list[dict[str, bool]] = [{}, {"center": False}, {"scale": False}, {"center": False, "scale": False}]
# Modules, the rank of their inputs, and the shape of one input but for the channels.
MODULES = [
    (torch.nn.BatchNorm1d, 2, ()),
    (torch.nn.BatchNorm1d, 3, (4,)),
    (torch.nn.BatchNorm2d, 4, (4, 3)),
    (torch.nn.BatchNorm3d, 5, (2, 3, 2)),
    (torch.nn.SyncBatchNorm, 4, (4, 3)),
]
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _error(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want) / (1 + np.abs(want))))


def _values(names: list[str], channels: int) -> list[NDArray[np.float64]]:
    rng = np.random.default_rng(1)
    return [rng.uniform(0.5, 2, channels) if "mean" not in name else rng.normal(0, 1, channels) for name in names]


def _trained_module(kind: Any, rest: tuple[int, ...], channels: int, **arguments: Any) -> Any:
    """A torch module after two training steps (SyncBatchNorm trains on accelerators alone: it gets their state)."""
    torch.manual_seed(0)
    trainee = (torch.nn.BatchNorm2d if kind is torch.nn.SyncBatchNorm else kind)(channels, **arguments)
    for parameter in trainee.parameters():
        torch.nn.init.normal_(parameter)
    for _ in range(2):
        trainee(torch.randn((8, channels, *rest), dtype=arguments.get("dtype")) * 2 + 3)
    module = kind(channels, **arguments)
    module.load_state_dict(trainee.state_dict())
    return module.eval()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("flags", [*FLAGS, {"renorm": True}])
@pytest.mark.parametrize("channels", [1, 3])
def test_keras_layers_round_trip(policy: str, flags: dict[str, bool], channels: int) -> None:
    """Keras's layer becomes ours, and ours another of Keras's: the same bits in the same variables."""
    original = keras.layers.BatchNormalization(axis=1, epsilon=1e-4, dtype=policy, **flags)
    original.build((None, channels, 4))
    original.set_weights(_values([v.name for v in original.weights], channels))
    bn = from_keras(original)
    assert [v.name for v in bn.weights] == [v.name for v in original.weights]
    assert [w.tobytes() for w in bn.get_weights()] == [w.tobytes() for w in original.get_weights()]
    copy = keras.layers.BatchNormalization.from_config(bn.get_config())
    copy.build((None, channels, 4))
    to_keras(bn, copy)
    assert copy.get_config() == original.get_config()
    assert [w.tobytes() for w in copy.get_weights()] == [w.tobytes() for w in original.get_weights()]
    x = np.random.default_rng(2).normal(0, 1, (6, channels, 4)).astype(bn.compute_dtype)
    bound = {2: 2e-2, 4: 2e-6, 8: 2e-6}[bn.compute_dtype.itemsize]  # Keras computes float64 in float32
    assert _error(bn(x), original(x)) < bound


def test_a_keras_layer_that_is_not_built_or_another_one() -> None:
    """Real layers behave as the stand-ins of the unit tests do."""
    assert not from_keras(keras.layers.BatchNormalization()).built
    bn = BatchNormalization(name="bn")
    bn.build((None, 3))
    target = keras.layers.BatchNormalization(epsilon=1e-5)
    with pytest.raises(ValueError, match=r"the Keras layer has no weights yet: call its build"):
        to_keras(bn, target)
    target.build((None, 3))
    with pytest.raises(ValueError, match=r"the Keras layer is another one: epsilon=1e-05 where 0.001 is expected\."):
        to_keras(bn, target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "ndim", "rest"), MODULES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_torch_modules_round_trip(
    kind: Any, ndim: int, rest: tuple[int, ...], dtype: Any, affine: bool, channels: int
) -> None:
    """torch's module becomes ours, and ours another of torch's: equal states, equal outputs at inference."""
    module = _trained_module(kind, rest, channels, affine=affine, dtype=dtype)
    model = torch.nn.Sequential(torch.nn.Identity(), module)
    bn = from_torch(model.state_dict(), ndim=ndim, prefix="1.", eps=module.eps, momentum=module.momentum)
    assert bn.state.version == 2
    x = torch.randn((6, channels, *rest), dtype=dtype)
    want = module(x).detach().to(torch.float64).numpy()
    assert _error(bn(x.to(torch.float64).numpy()), want) < DTYPES[dtype]
    copy = kind(**torch_arguments(bn), dtype=dtype).eval()
    copy.load_state_dict({key: torch.from_numpy(value) for key, value in to_torch(bn).items()}, strict=True)
    assert list(copy.state_dict()) == list(module.state_dict())
    for key, value in module.state_dict().items():
        assert copy.state_dict()[key].dtype == value.dtype
        assert torch.equal(copy.state_dict()[key], value)


@pytest.mark.parametrize("flags", FLAGS)
def test_our_layers_become_torch_modules(flags: dict[str, Any]) -> None:
    """What one of center and scale lacks is filled in, and changes no output."""
    bn = BatchNormalization(axis=1, **flags)
    bn.build((None, 3, 4, 4))
    bn.set_weights(_values([v.name for v in bn.weights], 3))
    module = torch.nn.BatchNorm2d(**torch_arguments(bn)).eval()
    module.load_state_dict({key: torch.from_numpy(value) for key, value in to_torch(bn).items()}, strict=True)
    x = np.random.default_rng(2).normal(0, 1, (2, 3, 4, 4)).astype(np.float32)
    assert _error(bn(x), module(torch.from_numpy(x)).detach().numpy()) < 2e-6


def test_a_torch_module_without_a_bias_is_a_scale() -> None:
    """torch's `bias=False`, which its state dict shows."""
    bn = from_torch(torch.nn.BatchNorm2d(3, bias=False).state_dict(), ndim=4)
    assert (bn.scale, bn.center) == (True, False)


def test_torch_modules_without_a_counterpart_are_refused() -> None:
    """No running statistics, and the cumulative average."""
    with pytest.raises(ValueError, match="track_running_stats=False has no running statistics"):
        from_torch(torch.nn.BatchNorm2d(3, track_running_stats=False).state_dict(), ndim=4)
    module = torch.nn.BatchNorm2d(3, momentum=None)
    with pytest.raises(ValueError, match="momentum=None is torch's cumulative average"):
        from_torch(module.state_dict(), ndim=4, momentum=module.momentum)


def test_further_training_differs_by_torchs_unbiased_variance() -> None:
    """After one step from equal values: moving means agree, moving variances by N/(N − 1) of the batch's part."""
    module = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    bn = from_torch(module.state_dict(), ndim=2)
    x = np.random.default_rng(2).normal(3, 2, (5, 3))
    module(torch.from_numpy(x))
    bn(x, training=True)
    assert _error(bn.moving_mean.value, module.running_mean.numpy()) < 1e-14
    ours, theirs = bn.moving_variance.value - 0.9, module.running_var.numpy() - 0.9
    assert _error(ours * (5 / 4), theirs) < 1e-14
    assert _error(ours, theirs) > 0.01


def test_folded_torch_convolutions() -> None:
    """A convolution and its norm, and a norm and the convolution behind it, against torch in float64."""
    module = _trained_module(torch.nn.BatchNorm2d, (4, 4), 3, dtype=torch.float64)
    bn = from_torch(module.state_dict(), ndim=4)
    for groups in (1, 3):
        conv = torch.nn.Conv2d(3, 3, 3, padding=1, groups=groups, dtype=torch.float64)
        x = torch.randn((2, 3, 5, 5), dtype=torch.float64) + 1e4
        kernel, bias = (p.detach().numpy() for p in (conv.weight, conv.bias))
        folded = [torch.from_numpy(a) for a in fold(bn, kernel, bias, channel_axis=0)]
        got = torch.nn.functional.conv2d(x, *folded, padding=1, groups=groups)
        assert _error(got, module(conv(x)).detach()) < 1e-10
    transposed = torch.nn.ConvTranspose2d(2, 3, 3, dtype=torch.float64)
    x = torch.randn((2, 2, 5, 5), dtype=torch.float64)
    kernel, bias = (p.detach().numpy() for p in (transposed.weight, transposed.bias))
    folded = [torch.from_numpy(a) for a in fold(bn, kernel, bias, channel_axis=1)]
    assert _error(torch.nn.functional.conv_transpose2d(x, *folded), module(transposed(x)).detach()) < 1e-13
    following = torch.nn.Conv2d(3, 2, 3, dtype=torch.float64)
    x = torch.randn((2, 3, 5, 5), dtype=torch.float64)
    kernel, bias = (p.detach().numpy() for p in (following.weight, following.bias))
    folded = [torch.from_numpy(a) for a in fold_following(bn, kernel, bias, channel_axis=1, output_axis=0)]
    assert _error(torch.nn.functional.conv2d(x, *folded), following(module(x)).detach()) < 1e-13


def test_folded_keras_layers() -> None:
    """Dense and convolution, with Keras's own layout and in float32."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(2).normal(0, 1, (2, 6, 6, 3)).astype(np.float32)
    for linear in (
        keras.layers.Dense(4),
        keras.layers.Conv2D(4, 3, padding="same"),
        keras.layers.Conv2DTranspose(4, 3, padding="same"),
    ):
        norm = keras.layers.BatchNormalization()
        norm(linear(x))
        norm.set_weights(_values([v.name for v in norm.weights], 4))
        want = keras.ops.convert_to_numpy(norm(linear(x)))
        axis = -2 if isinstance(linear, keras.layers.Conv2DTranspose) else -1
        linear.set_weights(list(fold(from_keras(norm), *linear.get_weights(), channel_axis=axis)))
        assert _error(keras.ops.convert_to_numpy(linear(x)), want) < 1e-5
