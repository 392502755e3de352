"""The collective as a layer uses it: enrolment, exact exchanges, pull and push."""

from __future__ import annotations

import numpy as np
import pytest

from bnlayer import BatchNormalization
from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation
from bnlayer.kernels import kernels
from bnlayer.view import View
from bnworker import World
from support.contract.registry import as_text, body, rows_of


@body()
def enrolment_seeds_from_rank_0(world: World) -> object:
    """The others' initial moving statistics are replaced by rank 0's."""
    bn = BatchNormalization(name="bn", synchronized=True, momentum=1.0, collective=world)
    bn.build((None, 4))
    bn.moving_mean.assign(np.full(4, 100.0 + world.rank, np.float32))
    bn(rows_of(world.rank), training=True)
    assert bn.moving_mean.value.tolist() == [100.0] * 4
    return as_text(bn.moving_mean.value)


@body()
def probes_and_sums_are_exact(world: World) -> object:
    """A probe is the MAX of every rank's words, sums are the SUM, bit for bit."""
    signature = LayerSignature(4, "float32", 0.99, 1e-3)
    bn = BatchNormalization(name="bn", synchronized=True)
    bn.build((None, 4))
    world.enroll(Call(Operation.ENROLL, ExchangeKey("bn", None, 0), signature), bn.state)
    views = [View.of(rows_of(rank), 1, None) for rank in range(world.world_size)]
    grid = bn.state.forward
    probes = [kernels().probe(view.x, None, grid) for view in views]
    key = ExchangeKey("bn", Direction.FORWARD, 0)
    sent = probes[world.rank].copy()
    got = world.exchange(Call(Operation.PROBE, key, signature), sent).limbs
    assert np.array_equal(got, np.max(probes, 0))
    assert np.array_equal(sent, probes[world.rank])
    grid = grid.probed(got, np.ones(4, bool))
    sums = [kernels().moments(view.x, None, grid) for view in views]
    agreed = LayerSignature(4, "float32", 0.99, 1e-3, grid=grid.fingerprint)
    total = world.exchange(Call(Operation.SUMS, key, agreed, 1), sums[world.rank])
    assert np.array_equal(total.limbs, np.sum(sums, 0))
    return as_text(total.limbs)


@body()
def layers_agree_in_outputs_and_gradients(world: World) -> object:
    """Every rank holds the union's statistics and gradients after a step."""
    bn = BatchNormalization(name="bn", synchronized=True, collective=world)
    union = np.concatenate([rows_of(rank) for rank in range(world.world_size)])
    mine = slice(8 * world.rank, 8 * world.rank + 8)
    alone = BatchNormalization(name="bn")
    want_y, want_dx = alone(union, training=True), alone.backward(union)
    y, dx = bn(union[mine], training=True), bn.backward(union[mine])
    assert y.tobytes() == want_y[mine].tobytes()
    assert dx.tobytes() == want_dx[mine].tobytes()
    assert bn.gamma is not None
    assert bn.gamma.gradient is not None
    return [as_text(bn.moving_mean.value), as_text(bn.moving_variance.value), as_text(bn.gamma.gradient)]


@body(transports=("alone", "mpi", "torch"))
def pull_does_nothing_where_each_rank_owns_its_own(world: World) -> object:
    """Not even a layer that is not built is looked at."""
    assert world.pull(BatchNormalization(name="bn")) is None
    return None


@body()
def an_unbuilt_layer_can_not_be_pushed(world: World) -> object:
    """It has no statistics yet."""
    with pytest.raises(ValueError, match=r"^Layer 'bn' has no state yet"):
        world.push(BatchNormalization(name="bn"))
    return None


@body()
def what_all_push_is_trained_on(world: World) -> object:
    """After the same push on every rank, training starts from the pushed statistics everywhere."""
    bn = BatchNormalization(name="bn", synchronized=True, momentum=1.0, collective=world)
    bn(rows_of(world.rank), training=True)
    world.barrier()
    bn.moving_mean.assign(np.full(4, 7.0, np.float32))
    world.push(bn)
    world.barrier()
    world.pull(bn)
    bn(rows_of(world.rank), training=True)
    assert bn.moving_mean.value.tolist() == [7.0] * 4
    return as_text(bn.moving_mean.value)
