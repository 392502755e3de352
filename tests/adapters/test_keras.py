"""The Keras layer in one process, on the JAX backend: files, conversion, configuration, and what it refuses."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from bnlayer.adapters.keras import BatchNormalization, convert, reduce_gradients, revert

# Keras's variables convert as NumPy 1 asked.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


def batch(seed: int) -> Any:
    """Random numbers."""
    return np.random.default_rng(seed).standard_normal((8, 4)).astype(np.float32)


def network(name: str, normalization: Any = layers.BatchNormalization, **arguments: Any) -> Any:
    """A layer in the model, and one in a model in it."""
    x = keras.Input((4,))
    inner = keras.Sequential(
        [keras.Input((3,)), normalization(name=f"{name}_inner", **arguments)], name=f"{name}_nested"
    )
    h = normalization(name=f"{name}_outer", **arguments)(layers.Dense(3, name=f"{name}_dense")(x))
    return keras.Model(x, inner(h))


def norms(model: Any) -> list[Any]:
    """The normalization layers, nested ones too."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]


def test_converts_in_place_and_back() -> None:
    """Weights and the optimizer's hold on them stay; what was compiled trains on, synchronized."""
    model = network("converted")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(batch(0), batch(1)[:, :3], verbose=0)
    before = model.get_weights()
    assert convert(model) is model
    assert [(type(layer), layer.synchronized) for layer in norms(model)] == [(BatchNormalization, True)] * 2
    assert all(map(np.array_equal, before, model.get_weights()))
    model.fit(batch(0), batch(1)[:, :3], verbose=0)
    assert all(layer._host is not None for layer in norms(model)), "our layer was not called"
    outputs = model.predict(batch(2), verbose=0)
    revert(model)
    assert [(type(layer), layer.synchronized) for layer in norms(model)] == [(layers.BatchNormalization, False)] * 2
    assert np.array_equal(model.predict(batch(2), verbose=0), outputs)


def test_subclasses_are_left_alone() -> None:
    """What they do is not known."""

    class Special(layers.BatchNormalization):
        pass

    model = keras.Sequential([keras.Input((4,)), Special()])
    assert type(norms(convert(model))[0]) is Special


def test_files(tmp_path: Path) -> None:
    """Ours load as ours; reverted ones as Keras's, where there is nothing of ours, and can be converted again."""
    model = network("saved", BatchNormalization, synchronized=True, renorm=True)
    model.compile(reduce_gradients(keras.optimizers.Adam()), "mse")
    model.fit(batch(0), batch(1)[:, :3], verbose=0)
    outputs = model.predict(batch(2), verbose=0)
    model.save(tmp_path / "ours.keras")
    model.save_weights(tmp_path / "ours.weights.h5")
    loaded = keras.models.load_model(tmp_path / "ours.keras")
    assert [(type(layer), layer.synchronized) for layer in norms(loaded)] == [(BatchNormalization, True)] * 2
    assert loaded.optimizer.get_config() == keras.optimizers.Adam().get_config() | {"name": "adam"}
    assert np.array_equal(loaded.predict(batch(2), verbose=0), outputs)

    plain = network("saved", renorm=True)
    plain.load_weights(tmp_path / "ours.weights.h5")
    assert np.array_equal(plain.predict(batch(2), verbose=0), outputs)

    revert(loaded).save(tmp_path / "plain.keras")
    np.save(tmp_path / "x.npy", batch(2))
    program = (
        "import keras, numpy, sys; folder = sys.argv[1]\n"
        "y = keras.models.load_model(folder + '/plain.keras').predict(numpy.load(folder + '/x.npy'), verbose=0)\n"
        "assert not any(name.startswith('bnlayer') for name in sys.modules)\n"
        "numpy.save(folder + '/y.npy', y)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, capture_output=True, timeout=600)
    assert np.array_equal(np.load(tmp_path / "y.npy"), outputs)
    reconverted = convert(keras.models.load_model(tmp_path / "plain.keras"))
    assert np.array_equal(reconverted.predict(batch(2), verbose=0), outputs)


def test_configuration_is_kerass() -> None:
    """And Keras's own is ours."""
    arguments: dict[str, Any] = {"axis": 1, "momentum": 0.5, "renorm": True, "renorm_clipping": {"dmax": 1.0}}
    config = BatchNormalization(synchronized=True, name="configured", **arguments).get_config()
    assert config == layers.BatchNormalization(name="configured", **arguments).get_config() | {"synchronized": True}
    assert BatchNormalization.from_config(config).get_config() == config


def test_half_precision() -> None:
    """float16 data beside float32 variables, as Keras's layer computes it."""
    policy = keras.DTypePolicy("mixed_float16")
    ours = BatchNormalization(synchronized=True, dtype=policy, name="half")
    kerass = layers.BatchNormalization(dtype=policy)
    for seed in range(3):
        got, want = (np.asarray(layer(batch(seed), training=True)) for layer in (ours, kerass))
        assert got.dtype == want.dtype == np.float16
        np.testing.assert_allclose(got, want, atol=2e-3)
    np.testing.assert_allclose(ours.moving_variance, kerass.moving_variance, rtol=1e-6)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Keras's words where it has them."""
    layer = BatchNormalization(synchronized=True, name="refusing")
    layer.build((None, 4))
    with pytest.raises(ValueError, match=r"one dimension less than the inputs. Received: mask.shape=\(8, 4\)"):
        layer.call(batch(0), training=True, mask=np.ones((8, 4), bool))
    with pytest.raises(ValueError, match="op: expected 'mean' or 'sum', received 'max'"):
        reduce_gradients(keras.optimizers.SGD(), "max")  # type: ignore[arg-type]
    monkeypatch.setenv("BNLAYER_WORLD_SIZE", "2")
    monkeypatch.setenv("BNLAYER_RANK", "0")
    with pytest.raises(RuntimeError, match=r"announces 2 ranks .* Call bnworker.join\(\)"):
        layer.call(batch(0), training=True)
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")
    with pytest.raises(ValueError, match="Expected one of the backends torch, jax, tensorflow, numpy"):
        layer.call(batch(0), training=True)


def test_gradients_are_reduced_before_scaling_and_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LossScaleOptimizer sees the ranks' common gradients, and so do all ranks the same overflow."""
    import bnlayer.adapters.jax as adapter

    class World:
        world_size = 2

        def allreduce(self, arrays: Any, op: str = "sum") -> list[Any]:
            return [3 * np.asarray(array) for array in arrays]  # the other rank's are twice this one's

    monkeypatch.setattr("bnlayer.adapters.host.current", World)
    for op, factor in (("mean", 1.5), ("sum", 3.0)):
        for scaled in (False, True):
            variable = keras.Variable(np.zeros(2, np.float32))
            inner = keras.optimizers.SGD(1.0, clipvalue=4.0)
            optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0) if scaled else inner
            reduce_gradients(optimizer, op)  # type: ignore[arg-type]
            optimizer.build([variable])
            gradient = np.array([1.0, 2.0], np.float32) * (8.0 if scaled else 1.0)
            (after,), _ = optimizer.stateless_apply(
                [v.value for v in optimizer.variables], [gradient], [variable.value]
            )
            assert np.array_equal(after, -np.minimum(factor * np.array([1.0, 2.0]), 4.0)), (op, scaled)
    assert adapter.allreduce([np.ones(2, np.float32)], "mean")[0].tolist() == [1.5, 1.5]
