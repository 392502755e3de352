"""Elastic jobs, without a service: what a state holds, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bnworker
from bnlayer import BatchNormalization, ServiceError
from bnlayer.errors import JobFinishedError
from bnworker.elastic_job import ElasticJob, Generation
from bnworker.limits import Limits
from bnworker.transports.alone import AloneTransport
from bnworker.world import World


@pytest.fixture(autouse=True)
def nothing_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment of whoever runs the tests."""
    for name in ("BNLAYER_ELASTIC", "BNLAYER_ADDRESS", "BNLAYER_RANK", "BNLAYER_WORLD_SIZE", "BNLAYER_TRANSPORT"):
        monkeypatch.delenv(name, raising=False)


def _layer() -> BatchNormalization:
    layer = BatchNormalization(synchronized=True, name="bn", collective=World(AloneTransport(), install=False))
    layer.build((None, 2))
    return layer


def test_a_state_is_whole_as_it_was_saved() -> None:
    """What came after is gone: in weights, statistics, grids, values of each kind; and calls without gradients."""
    layer = _layer()
    state: Any = bnworker.State(layers=[layer], kernel=np.eye(2, dtype=np.float16), step=0, on=True, best=0.5, name="a")
    layer(np.ones((4, 2), np.float32), training=True)
    layer.backward(np.ones((4, 2), np.float32))
    assert layer.gamma is not None
    layer.gamma.assign([3.0, 4.0])
    state.step, state.on, state.best, state.name, state.kernel = 7, False, float("nan"), "ü", np.zeros((3, 0))
    state.save()
    kept = {name: array.copy() for name, array in layer.state.arrays().items()}
    layer(np.full((4, 2), 9, np.float32), training=True)
    layer.gamma.assign([0.0, 0.0])
    state.step, state.kernel = 8, np.ones(1)
    state.take(World(AloneTransport(), install=False), 5, state.packed())
    assert (state.step, state.on, state.name, state.kernel.shape, state.saves) == (7, False, "ü", (3, 0), 5)
    assert [type(value) for value in (state.step, state.on, state.best)] == [int, bool, float]
    assert np.isnan(state.best)
    assert layer.gamma.numpy().tolist() == [3.0, 4.0]
    for name, array in layer.state.arrays().items():
        assert array.tobytes() == kept[name].tobytes(), name
    with pytest.raises(RuntimeError, match="there was none since"):
        layer.backward(np.ones((4, 2), np.float32))


def test_what_was_saved_is_not_written_to() -> None:
    """An array that the loop changes in place is another one than what was saved, and than what was given back."""
    state: Any = bnworker.State(kernel=np.zeros(2))
    world = World(AloneTransport(), install=False)
    for _ in range(2):
        state.kernel += 1
        state.take(world, 1, [array.copy() for array in state.packed()])
        assert state.kernel.tolist() == [0, 0]


def test_what_a_state_refuses() -> None:
    """Names and values, when it is made or saved."""
    with pytest.raises(ValueError, match=r"State\(save=\): this name is taken"):
        bnworker.State(save=1)
    with pytest.raises(TypeError, match="State: model is a dict; expected an array, a number, bool, str or bytes"):
        bnworker.State(model={})
    with pytest.raises(ValueError, match="has no state yet: call it once"):
        bnworker.State(layers=[BatchNormalization(synchronized=True)])
    state = bnworker.State(step=0)
    with pytest.raises(AttributeError, match="this state has no value 'steps': it has step"):
        _ = state.steps
    with pytest.raises(RuntimeError, match="expected to be within `with generation as world:`"):
        state.commit()


@pytest.mark.parametrize("text", ["2", "a:b", "3:2", "0:2", "-1:2", "1:99999999", "2:"])
def test_limits_that_are_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they are said."""
    with pytest.raises(ValueError, match=r"expected MIN:MAX, such as 2:8, received|expected 1 <= MIN <= MAX <= "):
        Limits.parsed(text)
    monkeypatch.setenv("BNLAYER_ELASTIC", text)
    with pytest.raises(ValueError, match=r"^BNLAYER_ELASTIC: expected "):
        bnworker.elastic(bnworker.State())


def test_an_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one; and both are needed from somewhere."""
    with pytest.raises(ValueError, match=r"elastic\(\): expected min= and max=, or a launcher that says them"):
        bnworker.elastic(bnworker.State(), min=2)
    monkeypatch.setenv("BNLAYER_ELASTIC", "2:8")
    assert bnworker.elastic(bnworker.State(), max=4)._limits == Limits(2, 4)
    with pytest.raises(ValueError, match=r"elastic\(min=, max=\): expected 1 <= MIN <= MAX <= 1048576, received 9:8"):
        bnworker.elastic(bnworker.State(), min=9)


def test_a_rank_that_comes_back_when_the_others_have_finished() -> None:
    """Its loop ends, as that of a rank which comes too late; other errors leave it."""
    world = World(AloneTransport(), install=False)
    for error, ends in ((JobFinishedError("over"), True), (ServiceError("away"), False)):
        job = ElasticJob(bnworker.State(), Limits(1, 2), 1.0)
        generation = Generation(job, world, 1)
        if ends:
            with generation:
                raise error
            assert list(job) == []
        else:
            with pytest.raises(ServiceError, match="away"), generation:
                raise error


def test_it_needs_a_service() -> None:
    """That outlives its ranks: alone, there is none."""
    with pytest.raises(ValueError, match="an elastic job needs a statistics service that outlives its ranks, and this"):
        next(bnworker.elastic(bnworker.State(), min=1, max=2))


def test_a_plain_join_in_an_elastic_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would not go on when ranks are lost."""
    monkeypatch.setenv("BNLAYER_ELASTIC", "2:8")
    with pytest.raises(ValueError, match=r"This job is elastic \(BNLAYER_ELASTIC=2:8\).*Use bnworker.elastic\(\) in"):
        bnworker.join()
