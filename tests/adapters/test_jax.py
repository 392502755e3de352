"""`sync_batch_norm` and Flax's module in one process: the layer's own bits, and what they refuse."""

import gc
from typing import Any
from weakref import ref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bnlayer import BatchNormalization
from bnlayer.adapters.flax import SyncBatchNorm
from bnlayer.adapters.host import HostLayer
from bnlayer.adapters.jax import allreduce, call, sync_batch_norm

ZEROS, ONES = np.zeros(3, np.float32), np.ones(3, np.float32)


def batch(seed: int, scale: float = 1.0, shape: tuple[int, ...] = (8, 3)) -> Any:
    """Random numbers."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 1e-40], ids=["ordinary", "subnormal"])
@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_bits_of_the_layer(scale: float, compiled: bool) -> None:
    """XLA's threads round subnormal numbers to zero; a pass on the host does not."""
    layer = BatchNormalization(synchronized=True, name=f"own {scale} {compiled}", grad_reduction="local")
    wants, moving = [], (ZEROS, ONES)

    def differentiated(x: Any, gamma: Any, beta: Any, moving: Any, dy: Any) -> Any:
        def function(x: Any, gamma: Any, beta: Any) -> Any:
            y, *moved = sync_batch_norm(x, gamma, beta, *moving, name=f"function {scale} {compiled}")
            return y, moved

        y, pull, moved = jax.vjp(function, x, gamma, beta, has_aux=True)
        return y, *pull(dy), moved

    run = jax.jit(differentiated) if compiled else differentiated
    for number in range(3):
        x, dy = batch(number, scale), batch(number + 100)
        y, pullback = layer.vjp(x, training=True)
        wants = [y, *pullback(dy), *layer.state.moving.values]
        *got, moving = run(x, ONES, ZEROS, moving, dy)
        for array, want in zip([*got, *moving], wants, strict=True):
            assert np.asarray(array).tobytes() == np.asarray(want).tobytes()


def test_a_call_may_be_pulled_back_twice_or_never() -> None:
    """What a call saves lies in JAX's arrays."""
    y, pull = jax.vjp(lambda x: sync_batch_norm(x, ONES, ZEROS, ZEROS, ONES, name="twice pulled")[0], batch(0))
    jax.vjp(lambda x: sync_batch_norm(x, ONES, ZEROS, ZEROS, ONES, name="twice pulled")[0], batch(1))
    first, second = pull(y)[0], pull(y)[0]
    assert np.array_equal(first, second)
    assert np.abs(first).max() < 1e-2  # y itself is all but removed: it is the projection's own direction
    assert np.abs(pull(batch(2))[0]).max() > 0.1


def test_statistics_are_the_callers() -> None:
    """The same moving statistics give the same result, whatever was called in between."""
    first = sync_batch_norm(batch(0), None, None, ZEROS, ONES, name="functional")
    sync_batch_norm(batch(1), None, None, *first[1:], name="functional")
    second = sync_batch_norm(batch(0), None, None, ZEROS, ONES, name="functional")
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_inference_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is differentiable in everything."""
    monkeypatch.setenv("BNLAYER_WORLD_SIZE", "2")
    monkeypatch.setenv("BNLAYER_RANK", "0")
    x, mean, variance = batch(0), batch(1)[0], np.abs(batch(2)[0])

    def infer(x: Any, gamma: Any, beta: Any) -> Any:
        return sync_batch_norm(x, gamma, beta, mean, variance, training=False, name="inference")[0]

    want = 2 * (x - mean) / np.sqrt(variance + 1e-3) + 1
    np.testing.assert_allclose(infer(x, 2 * ONES, ONES), want, atol=1e-6)
    assert np.array_equal(jax.grad(lambda beta: infer(x, ONES, beta).sum())(ZEROS), 8 * ONES)
    with pytest.raises(RuntimeError, match=r"announces 2 ranks .* Call bnworker.join\(\)"):
        sync_batch_norm(x, None, None, mean, variance, name="not joined")


def test_what_is_refused_when_traced() -> None:
    """Before anything is exchanged."""
    sync_batch_norm(batch(0), ONES, None, ZEROS, ONES, name="settings")
    with pytest.raises(
        ValueError, match=r"'settings' was called with momentum=0.5 where it had 0.99, center=True where it had False"
    ):
        sync_batch_norm(batch(0), ONES, ZEROS, ZEROS, ONES, momentum=0.5, name="settings")
    with pytest.raises(ValueError, match="expected ndim=2 and 3 channels"):
        sync_batch_norm(batch(0, shape=(2, 2, 3)), ONES, None, ZEROS, ONES, name="settings")
    with pytest.raises(ValueError, match="received float32 data and float16 variables"):
        sync_batch_norm(batch(0), None, None, ZEROS.astype("float16"), ONES, name="dtypes")
    with pytest.raises(TypeError, match="Expected x of a float dtype, received int32"):
        sync_batch_norm(np.ones((2, 3), np.int32), None, None, ZEROS, ONES, name="integers")
    with pytest.raises(ValueError, match="op: expected 'mean' or 'sum', received 'max'"):
        allreduce([ONES], "max")  # type: ignore[arg-type]


def test_compiled_programs_keep_no_layer_alive() -> None:
    """A layer that is gone gives its name back; its program says so."""
    layer = HostLayer(name="gone", axis=-1)
    ref_to_layer = ref(layer)
    program = jax.jit(lambda x: call(ref_to_layer, x, (ONES, ZEROS), (ZEROS, ONES), None)[0])
    program(batch(0))
    call(ref_to_layer, jnp.asarray(batch(0)), (ONES, ZEROS), (ZEROS, ONES), None)
    del layer
    gc.collect()
    assert ref_to_layer() is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="The layer of this program was deleted"):
        jax.block_until_ready(program(batch(1)))


def test_flax_module_equals_flax() -> None:
    """Three compiled steps: loss, gradients and running statistics."""

    class Network(nnx.Module):
        def __init__(self, make: Any, **arguments: Any) -> None:
            rngs = nnx.Rngs(0)
            self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
            self.norm = make(4, rngs=rngs, **arguments)

        def __call__(self, x: Any) -> Any:
            return self.last(nnx.relu(self.norm(self.first(x))))

    @nnx.jit
    def step(network: Network, x: Any) -> Any:
        return nnx.value_and_grad(lambda network: (network(x) ** 2).mean())(network)

    results = []
    for network in (Network(nnx.BatchNorm, use_fast_variance=False), Network(SyncBatchNorm, name="flax")):
        seen = [step(network, batch(number)) for number in range(3)]
        results.append(jax.tree.leaves((seen, nnx.state(network, nnx.BatchStat))))
    for want, got in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(ValueError, match="axis_name and axis_index_groups are about devices of one process"):
        SyncBatchNorm(3, name="axes", rngs=nnx.Rngs(0), axis_name="data")
