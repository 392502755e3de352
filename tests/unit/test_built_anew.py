"""What holds of a layer that is set or built anew after its first call, and of the calls before."""

from __future__ import annotations

import numpy as np
import pytest

from bnlayer import BatchNormalization
from bnlayer.collective import Alone
from bnlayer.dtypes import Policy
from support.layers import ByExchange


@pytest.mark.parametrize("world", [Alone, ByExchange])
def test_a_call_does_not_outlive_what_the_layer_was_built_for(world: type[Alone]) -> None:
    """A handle of other channels, or of another arithmetic, is refused, and harms nothing."""
    layer, x = BatchNormalization(synchronized=True, collective=world()), np.eye(3, dtype=np.float32)
    pull = layer.vjp(x, training=True)[1]
    for policy, batch in (("float32", x[:, :1]), ("float64", x)):
        layer.dtype_policy = Policy.of(policy)
        layer.build(batch.shape)
        layer(batch, training=True)
        has = f"{batch.shape[1]} in {policy}"
        with pytest.raises(RuntimeError, match=f"is of 3 channels in float32, and the layer's state of {has}"):
            pull(x)
        layer.backward(batch)
        assert layer.state.backward.gradient_C.shape == batch.shape[1:]


def test_what_ranks_compare_is_what_the_layer_is_now() -> None:
    """Other ranks and the owner of the statistics see what was set since the first call."""
    layer, x = BatchNormalization(), np.eye(3, dtype=np.float32)
    layer(x, training=True)
    seen = {layer._signature()}
    for name, value in {"momentum": 0.5, "epsilon": 0.25, "unbiased": True, "own_weights": True}.items():
        setattr(layer, name, value)
        assert getattr(layer._signature(), name) == value
        seen.add(layer._signature())
    layer.build((3, 2))
    assert layer._signature().channels == 2
    layer.dtype_policy = Policy.of("float64")
    assert layer._signature().dtype == layer._signature().policy == "float64"
    assert len(seen) == 5


@pytest.mark.parametrize("world", [Alone, ByExchange])
def test_a_layer_is_built_anew_for_another_arithmetic(world: type[Alone]) -> None:
    """Before, its calls are refused; nothing was done then."""
    layer, x = BatchNormalization(synchronized=True, collective=world()), np.eye(3, dtype=np.float32)
    layer(x, training=True)
    layer.dtype_policy = Policy.of("float64")
    with pytest.raises(RuntimeError, match="is of 3 channels in float64, and the layer's state of 3 in float32"):
        layer(x, training=True)
    layer.dtype_policy = Policy.of("float32")
    layer(x, training=True)
    assert layer.state.version == 2
