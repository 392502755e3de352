"""Training calls of a world of one, which go by what the call before has looked up: none of it may be out of date."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.collective import Alone, install
from bnlayer.dtypes import Policy
from bnlayer.kernels import _native
from bnlayer.variable import Variable
from support.layers import ByExchange

Step = Callable[[BatchNormalization, NDArray[Any]], Any]


def _set(name: str, value: Any) -> Step:
    return lambda layer, x: setattr(layer, name, value)


def _assign(name: str) -> Step:
    return lambda layer, x: getattr(layer, name).assign(np.full(x.shape[-1], 0.5))


def _written(layer: BatchNormalization, x: NDArray[Any]) -> Any:
    """A state that another layer came to."""
    other = BatchNormalization(synchronized=True, name="other", collective=ByExchange())
    for factor in (1, 2, 3):
        other(x * np.float32(factor), training=True)
    layer.restore(other.state)


def _unprobed(layer: BatchNormalization, x: NDArray[Any]) -> Any:
    other = BatchNormalization(synchronized=True, name="other", collective=ByExchange())
    other.build(x.shape)
    layer.restore(other.state)


def _observed(layer: BatchNormalization, x: NDArray[Any]) -> Any:
    seen: list[Any] = []
    layer.observe(seen.append)
    layer(x, training=True)
    layer.observe(None)
    return [moments.limbs for moments in seen]


def _frozen(layer: BatchNormalization, x: NDArray[Any]) -> Any:
    layer.trainable = False
    y = layer(x, training=True)
    layer.trainable = True
    return y


def _copied(layer: BatchNormalization, x: NDArray[Any]) -> Any:
    return [*copy.deepcopy(layer).state.arrays().values(), *pickle.loads(pickle.dumps(layer)).state.arrays().values()]


def _weights_set(layer: BatchNormalization, x: NDArray[Any]) -> Any:
    layer.set_weights([value + 1 for value in layer.get_weights()])


def _of_another_axis(layer: BatchNormalization, x: NDArray[Any]) -> Any:
    layer.axis = 0
    try:
        return layer(x.T.copy(), training=True)
    finally:
        layer.axis = -1


def _observed_by_a_list(layer: BatchNormalization, x: NDArray[Any]) -> Any:
    """An observer that is false as long as it has seen nothing."""

    class Log(list[Any]):
        def __call__(self, moments: Any) -> None:
            self.append(moments.limbs)

    log = Log()
    layer.observe(log)
    layer(x, training=True)
    layer.observe(None)
    return list(log)


def _replaced(dtype: Any) -> Step:
    def step(layer: BatchNormalization, x: NDArray[Any]) -> Any:
        layer.gamma = None if dtype is None else Variable(np.full(x.shape[-1], 2, dtype), "gamma", True)

    return step


def _taken(dtype: Any) -> Step:
    def step(layer: BatchNormalization, x: NDArray[Any]) -> Any:
        assert layer.gamma is not None
        layer.gamma.take(np.full(x.shape[-1], 2, dtype))

    return step


def _set_and_deleted(layer: BatchNormalization, x: NDArray[Any]) -> Any:
    layer.unbiased = True
    seen = [layer(x, training=True), layer(x, training=True), *layer.get_weights()]
    del layer.unbiased
    return seen


def _of_another_policy(layer: BatchNormalization, x: NDArray[Any]) -> Any:
    """A handle that was taken before."""
    pull = layer.vjp(x, training=True)[1]
    layer.dtype_policy = Policy.of("mixed_bfloat16")
    seen = [layer(x, training=True), layer(x, training=True), pull(x)[0]]
    layer.dtype_policy = Policy.of("float32")
    return [seen, [each.dtype.name for each in seen]]


def _built_anew(layer: BatchNormalization, x: NDArray[Any]) -> Any:
    """Its grid is of other channels, and of another dtype, then."""
    seen = []
    for policy, batch in (("float64", x[:, :3]), ("float32", x)):
        layer.dtype_policy = Policy.of(policy)
        layer.build(batch.shape)
        seen += [layer(batch, training=True), layer(batch, training=True)]
    return [seen, [each.dtype.name for each in seen]]


STEPS: dict[str, Step] = {
    "built anew": _built_anew,
    "an observer that is false": _observed_by_a_list,
    "gamma of float64": _replaced(np.float64),
    "no gamma": _replaced(None),
    "gamma takes float64": _taken(np.float64),
    "gamma takes float16": _taken(np.float16),
    "an attribute is deleted": _set_and_deleted,
    "dtype_policy": _of_another_policy,
    "momentum": _set("momentum", 0.5),
    "epsilon": _set("epsilon", 0.25),
    "unbiased": _set("unbiased", True),
    "trainable": _frozen,
    "axis": _of_another_axis,
    "moving_mean": _assign("moving_mean"),
    "moving_variance": _assign("moving_variance"),
    "gamma": _assign("gamma"),
    "beta": _assign("beta"),
    "set_weights": _weights_set,
    "restore": _written,
    "restore, without a grid": _unprobed,
    "observe": _observed,
    "copies": _copied,
    "a mask": lambda layer, x: layer(x, training=True, mask=np.arange(len(x)) % 3 > 0),
    "inference": lambda layer, x: layer(x),
    "no update": lambda layer, x: layer(x, training=True, update_moving=False),
    "state": lambda layer, x: list(layer.state.arrays().values()),
    "another length": lambda layer, x: layer(x[:7].copy(), training=True),
    "a row": lambda layer, x: layer(x[:1].copy(), training=True),
    "no row": lambda layer, x: layer(x[:0].copy(), training=True),
    "float64": lambda layer, x: layer(x.astype(np.float64), training=True),
    "integers": lambda layer, x: layer((x * 9).astype(np.int8), training=True),
    "a list": lambda layer, x: layer(x.tolist(), training=True),
    "other order of bytes": lambda layer, x: layer(x.astype(">f4"), training=True),
    "every other row": lambda layer, x: layer(np.repeat(x, 2, axis=0)[::2], training=True),
    "columns": lambda layer, x: layer(np.asfortranarray(x), training=True),
    "beyond the grid": lambda layer, x: layer(x * np.float32(1e20), training=True),
    "not finite": lambda layer, x: layer(np.where(x > 2, np.float32(np.nan), x), training=True),
}


@pytest.mark.parametrize("name", STEPS)
def test_nothing_that_was_looked_up_outlives_a_change(name: str) -> None:
    """Whatever happens between two calls, or between a call and its gradients: as by an exchange, bit by bit."""
    assert _everything(STEPS[name], Alone()) == _everything(STEPS[name], ByExchange())


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ["integers", "a list", "float64", "every other row", "a mask", "no row"])
def test_what_a_half_policy_converts_has_its_dtype(name: str, dtype: str) -> None:
    """Integers become float32 on their way."""
    step = STEPS[name]
    assert _everything(step, Alone(), dtype=dtype) == _everything(step, ByExchange(), dtype=dtype)


def test_a_batch_without_rows_need_not_be_aligned() -> None:
    """NumPy says that it is, wherever it begins."""
    layer, nothing = BatchNormalization(), np.ndarray((0, 3), np.float32, buffer=bytearray(8), offset=1)
    for x in (np.ones((4, 3), np.float32), nothing, nothing):
        y, pull = layer.vjp(x, training=True)
        assert pull(x)[0].shape == y.shape == x.shape


@pytest.mark.parametrize("arguments", [{"renorm": True}, {"center": False}, {"scale": False}, {"own_weights": True}])
def test_of_every_kind_of_layer(arguments: dict[str, Any]) -> None:
    """With corrections of renorm, which come between the statistics and the rest; without gamma, or beta."""
    step = STEPS["another length"]
    assert _everything(step, Alone(), **arguments) == _everything(step, ByExchange(), **arguments)


def test_a_backward_grid_is_found_before_it_is_used() -> None:
    """Gradients of zero fit any grid, also one that nobody has looked for."""
    seen = []
    for world in (Alone(), ByExchange()):
        layer, x = BatchNormalization(synchronized=True, name="bn", collective=world), np.eye(3, dtype=np.float32)
        pulls = [layer.vjp(x, training=True)[1] for _ in range(3)]
        pulls[2](np.zeros_like(x))
        seen.append(_bytes(list(layer.state.arrays().values())))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_inputs_that_were_written_to_are_refused(dtype: str) -> None:
    """As at the first call, and as for a batch that is not in one piece; with a second try, it is the same."""
    layer = BatchNormalization(dtype=dtype)
    x = np.ones((40, 6), layer.compute_dtype)
    for _ in range(3):
        layer(x, training=True)
        layer.backward(x)
    for rows in (x, np.ones((80, 6), layer.compute_dtype)[::2]):
        _, pull = layer.vjp(rows, training=True)
        dx = pull(rows)[0]
        np.multiply(rows, 2, out=rows)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="were written to"):
                pull(x)
        np.divide(rows, 2, out=rows)
        assert pull(rows)[0].tobytes() == dx.tobytes()


def _everything(step: Step, world: Alone, **arguments: Any) -> list[Any]:
    rng = np.random.default_rng(7)
    layer = BatchNormalization(synchronized=True, name="bn", collective=world, **arguments)
    seen: list[Any] = []

    def train(between: Step) -> None:
        """A call, something else, and the call's gradients; without a look at the state, which brings it up to date."""
        x, dy = rng.normal(size=(2, 24, 5)).astype(layer.compute_dtype)
        y, pull = layer.vjp(x, training=True)
        seen.append(y)
        seen.append(between(layer, x))
        seen.extend(pull(dy))
        seen.append(layer.get_weights())

    for _ in range(3):
        train(lambda layer, x: None)
    for _ in range(2):
        seen.append(step(layer, rng.normal(size=(24, 5)).astype(layer.compute_dtype)))
        for _ in range(3):
            seen.append(layer(rng.normal(size=(24, 5)).astype(layer.compute_dtype), training=True))
            seen.append(layer.get_weights())
            layer.forget_calls()
        train(step)
        train(lambda layer, x: None)
    seen.append(list(layer.state.arrays().values()))
    with pytest.raises(ValueError, match="expected ndim=2 and 5 channels"):
        layer(np.ones((24, 4), np.float32), training=True)
    with pytest.raises(ValueError, match="expected ndim=2 and 5 channels"):
        layer(np.ones((3, 24, 5), np.float32), training=True)
    layer.forget_calls()
    layer(np.ones((24, 5), np.float32), training=True)
    with pytest.raises(ValueError, match="expected dy of the output's shape"):
        layer.backward(np.ones((5, 24), np.float32))
    seen.append(layer.backward(np.ones((24, 5))))  # float64
    return [_bytes(each) for each in seen]


def _bytes(value: Any) -> Any:
    if isinstance(value, list):
        return [_bytes(each) for each in value]
    return value.tobytes() if isinstance(value, np.ndarray) else value


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The crossings into the kernels that sum over a batch."""
    crossings: list[str] = []

    def count(name: str) -> None:
        made = getattr(_native, name)

        def counted(*arguments: Any) -> Any:
            crossings.append(name)
            return made(*arguments)

        monkeypatch.setattr(_native, name, counted)

    for name in ("train_alone", "pull_alone", "moments", "probe", "gradient_sums", "gradient_probe"):
        count(name)
    return crossings


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_a_step_is_two_crossings(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """From the second call and the second backward pass on, for any number of rows."""
    crossings = _counted(monkeypatch)
    layer, rng = BatchNormalization(dtype=dtype), np.random.default_rng(0)
    for step, rows in enumerate((8, 8, 8, 5, 8)):
        x = rng.uniform(1, 2, size=(rows, 3)).astype(layer.compute_dtype)
        layer(x, training=True)
        layer.backward(x)
        if step < 2:
            crossings.clear()
    assert crossings == ["train_alone", "pull_alone"] * 3


def test_a_batch_beyond_the_grid_is_summed_over_once_more_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels refuse it, and the exchange with nobody begins with the pass that was refused."""
    crossings = _counted(monkeypatch)
    layer, x = BatchNormalization(), np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    for _ in range(3):
        layer(x, training=True)
    crossings.clear()
    layer(x * np.float32(1e20), training=True)
    assert crossings[0] == "train_alone"
    assert crossings.count("train_alone") == 1
    crossings.clear()
    layer(x * np.float32(1e20), training=True)
    assert crossings == ["train_alone"]


def test_a_world_that_is_joined_is_seen() -> None:
    """A layer that trained alone enrolls with it."""
    enrolled = []

    class Joined(ByExchange):
        def enroll(self, call: Any, state: Any) -> Any:
            enrolled.append(state.version)
            return super().enroll(call, state)

    layer, x = BatchNormalization(synchronized=True), np.ones((4, 3), np.float32)
    for _ in range(3):
        layer(x, training=True)
    before = install(Joined())
    try:
        layer(x, training=True)
    finally:
        install(before)
    assert enrolled == [3]
    assert layer.state.version == 4


def test_a_layer_of_float64_looks_nothing_up() -> None:
    """It is not for the one crossing: nothing is converted, and then converted again for the exchange."""
    layer = BatchNormalization(dtype="float64")
    for _ in range(3):
        layer(np.ones((4, 3), np.float32), training=True)
    assert layer._prepared is None
