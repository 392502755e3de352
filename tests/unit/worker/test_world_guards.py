"""What must not be silently wrong: interrupted exchanges, two at a time, layers that outlive their world."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import BatchNormalization, CollectiveError, MismatchError
from bnlayer.collective import Call, Total
from bnlayer.exchange import ForwardExchange
from bnlayer.grid import Grid
from bnlayer.moving import Moving
from bnlayer.state import LayerState
from bnproto.v1 import statistics_pb2 as pb
from bnworker import CheckpointError
from bnworker.plan import plan
from bnworker.transports import Seeded
from bnworker.transports.alone import AloneTransport
from bnworker.transports.service import ServiceTransport
from bnworker.transports.service.service_channel import Answer
from bnworker.world import World
from support.ranks import Meeting, SimulatedRank, run_all, run_ranks


class Preempted(BaseException):
    """What a signal handler raises."""


class Interrupted(AloneTransport):
    """A transport whose first exchange is cut off."""

    def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
        """Is never complete."""
        raise Preempted


def test_an_interrupted_exchange_ends_the_world() -> None:
    """A retry met the others' data with this rank's header: they got numbers out of nothing, without an error."""
    world = World(Interrupted(), install=False)
    bn = BatchNormalization(synchronized=True, name="bn", collective=world)
    with pytest.raises(Preempted):
        bn(np.ones((2, 2)), training=True)
    for call in (lambda: bn(np.ones((2, 2)), training=True), world.barrier):
        with pytest.raises(CollectiveError, match="An exchange of rank 0 was cut off by Preempted before it was comp"):
            call()


@pytest.mark.parametrize(
    ("name", "step", "kind", "text"),
    [
        ("best", 1, RuntimeError, r"this world has none: its ranks reach each other by 'alone'"),
        ("../best", 1, ValueError, r"checkpoint\(name=\): expected 1 to 100 letters, .* received '../best'"),
        (7, 1, TypeError, r"checkpoint\(name=\): expected text, received 7"),
        ("best", -1, ValueError, r"checkpoint\(step=\): expected 0 to 2\^62, received -1"),
        ("best", 2**62 + 1, ValueError, r"checkpoint\(step=\): expected 0 to 2\^62"),
        ("best", 1.5, TypeError, "'float' object cannot be interpreted as an integer"),
    ],
)
def test_a_checkpoint_that_nobody_would_keep_is_refused(name: Any, step: Any, kind: type[Exception], text: str) -> None:
    """Before anything is sent; without a service there is nobody to keep it, which is no success."""
    world = World(AloneTransport(), install=False)
    with pytest.raises(kind, match=text):
        world.checkpoint(name, step=step)
    world.barrier()
    assert world.statistics.exchanges.total() == 1


def test_a_service_of_an_earlier_version_keeps_no_checkpoint() -> None:
    """It takes the call for a barrier, and its answer says nothing of a checkpoint: that is no success either."""

    class Earlier(ServiceTransport):
        def __init__(self) -> None:
            self.rank, self.world_size = 0, 1

        def _exchanged(self, call: Call, arrays: Any, names: Sequence[str] = ()) -> Answer:
            return Answer(pb.ExchangeResponse(result=pb.Result(sequence=1)), b"")

    world = World(Earlier(), install=False)
    with pytest.raises(CheckpointError, match=r"it is of an earlier version than its ranks\. Upgrade it"):
        world.checkpoint("best", step=1)
    assert world.world_size == 1


def test_a_second_exchange_at_a_time_is_refused() -> None:
    """Two threads, or a signal handler: their messages would cross."""
    entered, go_on = threading.Event(), threading.Event()

    class Slow(AloneTransport):
        def barrier(self, call: Call) -> None:
            entered.set()
            assert go_on.wait(150)

    world = World(Slow(), install=False)
    thread = threading.Thread(target=world.barrier, daemon=True)
    thread.start()
    assert entered.wait(150)
    with pytest.raises(RuntimeError, match="A rank makes one exchange at a time"):
        world.allreduce([np.ones(1)])
    go_on.set()
    thread.join(150)
    assert world.allreduce([np.ones(1)])[0].tolist() == [1]


def test_a_forked_process_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over MPI it took its rank's place; a world of one has nobody to mislead."""

    class Elsewhere(AloneTransport):
        name = "mpi"
        left = False

        def leave(self, reason: str) -> None:
            self.left = True

    transport = Elsewhere()
    world, alone = World(transport, install=False), World(AloneTransport(), install=False)
    bn = BatchNormalization(synchronized=True, name="bn", collective=world)
    text = (
        f"Process 1 was forked from rank 0 (pid {os.getpid()}), which has joined its job: a rank is one process. Make "
    )
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: 1)
        for call in (world.barrier, lambda: world.pull("bn"), lambda: bn(np.ones((2, 2)), training=True)):
            with pytest.raises(CollectiveError) as raised:
                call()
            assert str(raised.value).startswith(text)
            assert raised.value.ranks == (0,)
        alone.barrier()
        world.leave()
    assert not transport.left


def test_what_is_refused_takes_no_number_and_counts_nowhere() -> None:
    """The next plain operation had a number that no other rank had, and every rank stalled."""

    class Numbered(AloneTransport):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def barrier(self, call: Call) -> None:
            self.steps.append(call.key.step)
            if len(self.steps) == 2:
                for exchange in (world.barrier, lambda: world.allreduce([np.ones(9)])):
                    with pytest.raises(RuntimeError, match="A rank makes one exchange at a time"):
                        exchange()  # as from a signal handler

    transport = Numbered()
    world = World(transport, install=False)
    for _ in range(3):
        world.barrier()
    world.leave()
    for refused in (world.barrier, lambda: world.allreduce([np.ones(9)])):
        with pytest.raises(RuntimeError, match="this world was left"):
            refused()
    assert transport.steps == [0, 1, 2]
    assert world._exchanges.plain_count == 3
    assert (world.statistics.bytes_sent, sum(world.statistics.exchanges.values())) == (0, 3)


def test_a_layer_that_was_refused_holds_no_name_and_no_shape() -> None:
    """A second layer of its name was refused for good, and its own shape was that of the refused batch."""
    left = World(AloneTransport(), install=False)
    left.leave()
    bn = BatchNormalization(synchronized=True, name="bn", collective=left)
    with pytest.raises(RuntimeError, match="this world was left"):
        bn(np.ones((2, 3)), training=True)
    assert not bn.built
    with pytest.raises(RuntimeError, match="this world was left"):
        BatchNormalization(synchronized=True, name="bn", collective=left)(np.ones((2, 3)), training=True)
    bn.collective = World(AloneTransport(), install=False)
    assert bn(np.ones((2, 4)), training=True).shape == (2, 4)


def test_a_layer_that_was_refused_takes_no_automatic_name() -> None:
    """Where one rank alone makes a mistake, and mends it, its next layer is called as on the others."""
    before = BatchNormalization().name
    with pytest.raises(ValueError):
        BatchNormalization(gamma_initializer="no such thing")
    number = int(before.rpartition("_")[2]) if before != "batch_normalization" else 0
    assert BatchNormalization().name == f"batch_normalization_{number + 1}"


def test_an_overflow_does_not_end_the_world() -> None:
    """Every rank is told of it, in step."""

    class Full(AloneTransport):
        def reduce(self, call: Call, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
            raise OverflowError

    world = World(Full(), install=False)
    with pytest.raises(OverflowError):
        world.allreduce([np.array([1], np.int8)])
    world.barrier()


def test_momentum_changed_on_one_rank_is_a_mismatch() -> None:
    """The mirror would follow the layer, the owner its first momentum."""

    def body(rank: SimulatedRank) -> None:
        bn = BatchNormalization(synchronized=True, name="bn", collective=rank)
        bn(np.ones((2, 2)), training=True)
        bn.momentum = 0.5 if rank.rank else 0.99
        bn(np.ones((2, 2)), training=True)

    for error in run_ranks(Meeting(2), body):
        assert isinstance(error, MismatchError)
        assert "momentum: rank 0 sent 0.99, rank 1 sent 0.5" in str(error)


def test_epsilon_counts_from_the_next_call_on() -> None:
    """In training as in inference, and in the configuration."""
    bn = BatchNormalization()
    x = np.random.default_rng(0).standard_normal((100, 2))
    bn(x, training=True)
    bn.epsilon = 1.0
    assert bn(x, training=True).std(0) == pytest.approx(np.sqrt(x.var(0) / (x.var(0) + 1)), rel=1e-5)


def test_a_layer_does_not_outlive_its_world_in_silence() -> None:
    """After the world was left, training on would be local; a backward pass belongs to the forward's ranks."""

    def body(rank: SimulatedRank) -> tuple[BatchNormalization, SimulatedRank]:
        bn = BatchNormalization(synchronized=True, name=f"outlives-{rank.rank}", collective=None)
        bn.name, bn.collective = "outlives", rank
        bn(np.full((2, 2), float(rank.rank)), training=True)
        bn.collective = None
        bn.backward(np.ones((2, 2)))
        return bn, rank

    for bn, _ in run_all(Meeting(2), body):
        assert bn.beta is not None
        assert bn.beta.gradient is not None
        assert bn.beta.gradient.tolist() == [4, 4]
        with pytest.raises(RuntimeError, match="belonged to a world of 2 ranks, which was left"):
            bn(np.ones((2, 2)), training=True)


def test_layers_can_be_copied_and_pickled_and_copies_need_a_name_of_their_own() -> None:
    """Best-model and moving-average code copies layers; a copy belongs to no world yet."""
    world = World(AloneTransport(), install=False)
    bn = BatchNormalization(synchronized=True, name="copied", collective=world)
    x = np.random.default_rng(0).standard_normal((9, 2))
    bn(x, training=True)
    for other in (copy.deepcopy(bn), copy.copy(bn), pickle.loads(pickle.dumps(bn))):
        assert [w.tobytes() for w in other.get_weights()] == [w.tobytes() for w in bn.get_weights()]
        assert other(x).tobytes() == bn(x).tobytes()
        other.collective = world
        with pytest.raises(ValueError, match="Two live synchronized layers are named 'copied'"):
            other(x, training=True)


@pytest.mark.parametrize("known", [True, False])
def test_statistics_of_somebody_else_are_announced(caplog: pytest.LogCaptureFixture, known: bool) -> None:
    """A job's name taken twice went on where the first run ended, in silence; a fresh job was told of such a run."""

    class Remembering(AloneTransport):
        name = "service"

        def enroll(self, call: Call, state: LayerState) -> Seeded:  # type: ignore[override]  # as the one it overrides
            moving = Moving(state.moving.mean + 1, state.moving.variance)
            return Seeded(LayerState(moving, state.forward, state.backward, version=7), known)

    bn = BatchNormalization(synchronized=True, name="bn", collective=World(Remembering(), install=False))
    with caplog.at_level(logging.WARNING, logger="bnworker"):
        bn(np.ones((2, 2)), training=True)
    expected = (
        "layer 'bn' goes on from the statistics that the service holds (version 7): an earlier run of this job left "
        "them, or a rank pushed them; for a fresh start give the job another name, or the layer: name="
        if known
        else "layer 'bn': this rank's moving statistics or grids were replaced by those of rank 0, which differ; all "
        "ranks begin from rank 0's"
    )
    assert [record.getMessage() for record in caplog.records] == [expected]


@np.errstate(all="raise")
def test_floating_point_settings_of_the_user_change_nothing() -> None:
    """One rank's FloatingPointError in the middle of a step stalled all others."""
    bn = BatchNormalization(synchronized=True, epsilon=0.0, collective=World(AloneTransport(), install=False))
    x = np.array([[1e-30, np.nan, 3e38], [2e-30, 1.0, -3e38]], np.float32)
    bn(x, training=True)
    assert bn.backward(np.full(x.shape, 1e-38)).shape == x.shape
    bn(x)


@np.errstate(all="raise")
def test_floating_point_settings_of_the_owner_change_nothing() -> None:
    """The service takes the same steps without a layer around them, under settings that it may have inherited."""
    exchange = ForwardExchange.begin(Grid("float32", np.zeros(1), np.array([-160]), True), 0.0, masked=False)
    constant = np.array([[0], [0], [0], [0], [3], [0]])  # three values on the pivot: the variance is 0
    statistics = exchange.reduced(constant).statistics
    assert statistics is not None
    assert np.isinf(statistics.inverse_std).all()


@pytest.mark.parametrize(
    ("environ", "arguments", "text"),
    [
        ({"BNLAYER_RANK": "1"}, {}, "BNLAYER_RANK is set, but BNLAYER_WORLD_SIZE is not: set both, or neither."),
        ({"BNLAYER_WORLD_SIZE": "3"}, {}, "BNLAYER_WORLD_SIZE is set, but BNLAYER_RANK is not"),
        ({}, {"job": "x"}, r"job= was given, but no address= \(or BNLAYER_ADDRESS\)"),
        ({}, {"address": "nohost", "job": "j", "rank": 0, "world_size": 1}, "expected HOST:PORT, e.g. 127.0.0.1:50551"),
        ({}, {"address": "http://h:1", "job": "j", "rank": 0, "world_size": 1}, "received 'http://h:1'"),
        ({}, {"address": "https:h:1", "job": "j", "rank": 0, "world_size": 1}, "received 'https:h:1'"),
        ({}, {"address": "h:99999", "job": "j", "rank": 0, "world_size": 1}, "received 'h:99999'"),
    ],
)
def test_half_a_world_is_refused(environ: dict[str, str], arguments: dict[str, object], text: str) -> None:
    """Each of these trained alone, or waited for the whole timeout."""
    with pytest.raises(ValueError, match=text):
        plan(environ, **arguments)  # type: ignore[arg-type]  # a table


def test_an_address_given_beats_the_environment() -> None:
    """Explicit arguments beat BNLAYER_*."""
    for transport in ("alone", "mpi"):
        chosen = plan({"BNLAYER_TRANSPORT": transport}, address="h:1", job="j", rank=0, world_size=1)
        assert (chosen.transport, chosen.address) == ("service", "h:1")
