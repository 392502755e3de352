"""A layer in a world of one that another thread, or a signal's handler, looks at or sets while it trains."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization, alone
from bnlayer.collective import Alone
from bnlayer.kernels import _native
from bnlayer.moving import Moving
from bnlayer.variable import Variable
from support.layers import ByExchange


@pytest.mark.parametrize("world", [Alone, ByExchange])
@pytest.mark.parametrize("name", ["reads", "sets"])
def test_another_thread_may_look_at_a_layer_that_trains(world: type[Alone], name: str) -> None:
    """Every call is counted once, and none half done looks like a variable that was assigned to."""
    layer, x = BatchNormalization(synchronized=True, collective=world()), np.ones((4, 3), np.float32)
    ended = threading.Event()
    versions = [0]

    def look() -> None:
        while not ended.is_set():
            if name == "sets":
                layer.note = object()  # type: ignore[attr-defined]
            versions.append(layer.state.version)

    layer(x, training=True)
    other, interval = threading.Thread(target=look), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    other.start()
    try:
        for _ in range(2000):
            layer.vjp(x, training=True)
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        other.join()
    assert layer.state.version == 2001
    assert versions == sorted(versions)
    assert not layer._state_set


def test_a_look_from_within_a_look_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal's handler does it, while the state is brought up to date."""
    layer, x = BatchNormalization(), np.ones((4, 3), np.float32)
    for _ in range(4):
        layer.vjp(x, training=True)

    def meanwhile(*vectors: Any) -> Moving:
        monkeypatch.setattr(alone, "Moving", Moving)
        assert layer.state.version == 4
        return Moving(*vectors)

    monkeypatch.setattr(alone, "Moving", meanwhile)
    assert layer.state.version == 4
    assert not layer._state_set


def test_weights_read_while_a_layer_trains_are_of_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying takes time, and what is copied is of one call all the same."""
    layer, x = BatchNormalization(), np.ones((4, 3), np.float32)
    layer(x, training=True)
    expected = [variable.value.copy() for variable in layer.weights]
    one = Variable.numpy

    def slow(variable: Variable) -> Any:
        layer(x, training=True)
        return one(variable)

    monkeypatch.setattr(Variable, "numpy", slow)
    values = layer.get_weights()
    assert [value.tolist() for value in values] == [value.tolist() for value in expected]
    assert all(value is not variable.value for value, variable in zip(values, layer.weights, strict=True))


@pytest.mark.parametrize("settings", [{}, {"renorm": True}])
def test_an_inference_while_a_layer_trains_is_of_one_moment(settings: dict[str, Any]) -> None:
    """Mean and variance are of one call."""
    x = np.arange(12, dtype=np.float32).reshape(4, 3)

    class Trained(BatchNormalization):
        meanwhile = False

        def _gamma(self) -> Any:
            if self.meanwhile:
                self.meanwhile = False
                self(x, training=True)
            return super()._gamma()

    layer = Trained(**settings)
    layer(x, training=True)
    expected = layer(x)
    layer.meanwhile = True
    assert layer(x).tobytes() == expected.tobytes()
    assert layer.state.version == 2


def test_what_a_subclass_does_while_it_is_set_keeps_nobody_waiting() -> None:
    """Its property, and the end of the value before, may wait for a thread that looks at another layer."""
    other = BatchNormalization()
    other.build((4, 3))
    looked: list[bool] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: other.state, daemon=True)
        thread.start()
        thread.join(10)
        looked.append(not thread.is_alive())

    class Old:
        def __del__(self) -> None:
            look()

    class Set(BatchNormalization):
        note: Any

        @property
        def rate(self) -> float:
            return 0.5

        @rate.setter
        def rate(self, value: float) -> None:
            look()

    layer = Set()
    layer.rate = 0.25
    layer.note = Old()
    layer.note = None
    assert looked == [True, True]


def test_an_attribute_that_is_set_during_a_call_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, say: the kernels don't hold Python's lock."""
    layer, x = BatchNormalization(), np.ones((4, 3), np.float32)
    for _ in range(3):
        layer(x, training=True)
    made = _native.train_alone

    def meanwhile(*arguments: Any) -> Any:
        layer.momentum = 0.5
        return made(*arguments)

    monkeypatch.setattr(_native, "train_alone", meanwhile)
    layer(x, training=True)
    assert layer.state.version == 4


@pytest.mark.parametrize(("name", "value"), [("momentum", 0.5), ("trainable", False)])
def test_a_call_while_an_attribute_is_set_does_not_keep_the_old_value(name: str, value: Any) -> None:
    """Another thread calls the layer after nothing of the old value holds, and before the new one is there."""
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    called = True

    class Called(BatchNormalization):
        def _drop_prepared(self) -> None:
            nonlocal called
            super()._drop_prepared()
            if not called:
                called = True
                self.vjp(x, training=True)  # in place of another thread

    layer = Called()
    for _ in range(3):
        layer(x, training=True)
    called = False
    setattr(layer, name, value)
    assert called
    before = layer.moving_mean.numpy()
    layer(x, training=True)
    expected = before * 0.5 + x.mean(axis=0) * 0.5 if name == "momentum" else before
    np.testing.assert_allclose(layer.moving_mean.numpy(), expected, rtol=1e-6)


_FORK = """
import os, threading
import numpy as np
from bnlayer import BatchNormalization, alone

inside, leave = threading.Event(), threading.Event()

class Slow(BatchNormalization):
    def catch_up(self):
        inside.set()
        leave.wait()
        super().catch_up()

slow, layer = Slow(), BatchNormalization()
slow.build((4, 3))
layer.build((4, 3))
os.register_at_fork(before=leave.set)
other = threading.Thread(target=lambda: slow.state)
other.start()
inside.wait()
child = os.fork()
if child == 0:
    os._exit(layer.state.version)
other.join()
os._exit(os.waitpid(child, 0)[1])
"""


def test_a_fork_while_another_thread_looks_at_a_state() -> None:
    """What keeps that look in one piece is free in the child."""
    # Python warns of threads and a fork: the child here does as little as it should.
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", _FORK], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("renorm", [False, True])
def test_a_signal_sees_no_half_of_an_exchange(renorm: bool) -> None:
    """Its handler looks at the state at every place where Python lets one in, of which a trace sees each line."""
    layer = BatchNormalization(synchronized=True, collective=ByExchange(), renorm=renorm)
    x = np.ones((4, 3), np.float32)
    layer(x, training=True)
    looks: list[tuple[int, bool]] = []
    before = sys.gettrace()  # a measurement of coverage goes on afterwards

    def look(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_name in ("_keep", "_take"):
            if event == "call":
                return look
            sys.settrace(None)
            looks.append((layer.state.version, layer._state_set))
            sys.settrace(look)
        return look

    sys.settrace(look)
    try:
        layer.vjp(x, training=True)
    finally:
        sys.settrace(before)
    assert set(looks) == {(1, False), (2, False)}
