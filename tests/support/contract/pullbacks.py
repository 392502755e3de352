"""Several calls that wait for their gradients, and calls that are made once more: with the bits of one process."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import Alone, BatchNormalization
from bnlayer.collective import Collective
from bnlayer.pullback import Pullback
from bnworker import World
from support.contract.registry import as_text, body, rows_of
from support.families import draw

_ROWS = 12
_CALLS = 3
# By the number of ranks: how many rows each of them has in each call; some have none.
_SHARDS = {1: ([12], [12], [12]), 2: ([5, 7], [0, 12], [11, 1]), 3: ([3, 4, 5], [7, 0, 5], [0, 0, 12])}
_ORDERS = {"in order": (0, 1, 2), "in reverse": (2, 1, 0), "mixed, one twice": (1, 2, 0, 1)}
_KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"dtype": "float64"},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 3.0, "dmax": 5.0}},
    "bfloat16": {"dtype": "mixed_bfloat16"},
    "without gamma": {"scale": False},
}


@dataclass(frozen=True)
class Batch:
    """The rows of one call, of all ranks; `mine` are those of one."""

    x: NDArray[np.float64]
    dy: NDArray[np.float64]
    mask: NDArray[np.bool_] | None
    mine: slice

    @classmethod
    def of(cls, call: int, family: str, masked: bool, world: Collective) -> Batch:
        """Each call has data of its own; each family its own jumps from one to the next."""
        sizes = _SHARDS[world.world_size][call]
        ends = list(accumulate(sizes))
        mask = np.random.default_rng([3, call]).random(_ROWS) < 0.6 if masked else None
        x, dy = (draw(name, seed, call, (_ROWS, 3), "float64") for name, seed in ((family, 0), ("jump", 1)))
        return cls(x, dy, mask, slice(ends[world.rank] - sizes[world.rank], ends[world.rank]))

    def call(self, bn: BatchNormalization, rows: slice, **options: Any) -> tuple[NDArray[Any], Pullback]:
        """The layer's call on some of the rows."""
        return bn.vjp(self.x[rows], training=True, mask=None if self.mask is None else self.mask[rows], **options)


def _compare(world: World, name: str, order: tuple[int, ...], family: str, masked: bool, **options: Any) -> list[Any]:
    """Two rounds of calls, all pulled back afterwards, beside one process on all rows."""
    bn, one = (
        BatchNormalization(name=name, synchronized=True, collective=ranks, **options) for ranks in (world, Alone())
    )
    seen: list[Any] = []
    for _ in range(2):
        batches = [Batch.of(call, family, masked, world) for call in range(_CALLS)]
        handles = []
        for batch in batches:
            y, pullback = batch.call(bn, batch.mine)
            want, alone = batch.call(one, slice(None))
            assert y.tobytes() == want[batch.mine].tobytes()
            handles.append((pullback, alone))
        for call in order:
            batch, (pullback, alone) = batches[call], handles[call]
            got, expected = pullback(batch.dy[batch.mine]), alone(batch.dy)
            assert got[0].tobytes() == expected[0][batch.mine].tobytes(), f"dx of call {call}"
            for gradient, wanted in zip(got[1:], expected[1:], strict=True):
                assert (gradient is None) is (wanted is None)
                if gradient is not None and wanted is not None:
                    assert gradient.tobytes() == wanted.tobytes()
                    seen.append(as_text(gradient))
    assert _state(bn) == _state(one)
    assert (bn.gamma is None or bn.gamma.gradient is None) and bn.beta is not None and bn.beta.gradient is None
    return [*seen, _state(bn)]


def _state(bn: BatchNormalization) -> list[list[str]]:
    return [as_text(array) for array in bn.state.arrays().values()]


@body()
def several_calls_wait_for_their_gradients(world: World) -> object:
    """Siamese branches, a GAN's two batches, an unrolled network: any order, on uneven and empty shards."""
    return [
        _compare(world, f"{kind} {order}", calls, "normal", masked=False, **options)
        for kind, options in _KINDS.items()
        for order, calls in _ORDERS.items()
    ]


@body()
def several_masked_calls_whose_scales_jump(world: World) -> object:
    """Grids change from call to call, forward and backward, between a call and its gradient."""
    return [
        _compare(world, f"{family} {masked} {order}", calls, family, masked=masked)
        for family in ("jump", "lognormal-3")
        for masked in (False, True)
        for order, calls in _ORDERS.items()
    ]


@body()
def values_that_are_not_finite_stay_in_their_own_call(world: World) -> object:
    """One call's nonfinite channel asks the owner for no grid, whichever call is pulled back."""
    bn, one = (
        BatchNormalization(name="bn", synchronized=True, collective=ranks, dtype="float64")
        for ranks in (world, Alone())
    )
    batches = [Batch.of(call, "normal", False, world) for call in range(_CALLS)]
    batches[1].x[3, 0], batches[1].x[4, 1] = np.nan, 1e300
    handles = [(batch.call(bn, batch.mine)[1], batch.call(one, slice(None))[1]) for batch in batches]
    for number, call in enumerate((1, 0, 1, 2)):
        batch, (pullback, alone) = batches[call], handles[call]
        dy = batch.dy * [
            1e30 if number == 2 else 1.0,
            1.0,
            1.0,
        ]  # which a channel that is not nonfinite would probe for
        dx, dgamma, _ = pullback(dy[batch.mine])
        assert dx.tobytes() == alone(dy)[0][batch.mine].tobytes()
        assert dgamma is not None
        assert (bool(np.isnan(dgamma[0])), bool(np.isnan(dgamma[2]))) == (call == 1, False)
    assert _state(bn) == _state(one)
    return _state(bn)


@body()
def a_call_that_is_made_once_more_changes_nothing(world: World) -> object:
    """Gradient checkpointing: the bits of the first call, and those of training without it, on the owner too."""
    plain, checkpointed, renorm = (
        BatchNormalization(name=name, synchronized=True, collective=world, renorm=name == "renorm")
        for name in ("plain", "checkpointed", "renorm")
    )
    for _ in range(2):
        for call in range(_CALLS):
            batch = Batch.of(call, "jump", call == 2, world)
            y, pullback = batch.call(plain, batch.mine)
            first, _ = batch.call(checkpointed, batch.mine)
            before = _state(checkpointed)
            recomputed_y, recomputed = batch.call(checkpointed, batch.mine, update_moving=False)
            assert y.tobytes() == first.tobytes() == recomputed_y.tobytes()
            assert _state(checkpointed) == before
            dy = batch.dy[batch.mine]
            assert pullback(dy)[0].tobytes() == recomputed(dy)[0].tobytes()
            # With renorm the corrections follow the moving statistics: the first of the two must leave them.
            early, _ = batch.call(renorm, batch.mine, update_moving=False)
            assert early.tobytes() == batch.call(renorm, batch.mine)[0].tobytes()
    world.barrier()
    for bn, updates in ((plain, 6), (checkpointed, 6), (renorm, 6)):
        assert bn.state.version == updates
        if (owned := world.pull(bn.name)) is not None:
            assert _state(bn) == [as_text(array) for array in owned.arrays().values()]
    assert _state(checkpointed) == _state(plain)
    return _state(renorm)


@body()
def a_layer_that_never_updates_keeps_its_first_grid(world: World) -> object:
    """Its moving statistics stay; the grid of its first call serves the next, so that it does not probe each time."""
    bn = BatchNormalization(name="bn", synchronized=True, collective=world)
    y = [bn(rows_of(world.rank), training=True, update_moving=False) for _ in range(3)][-1]
    assert bn.moving_mean.value.tolist() == [0.0] * 4
    assert bn.moving_variance.value.tolist() == [1.0] * 4
    assert bn.state.version == 0
    assert bn.state.forward.is_probed
    union = np.concatenate([rows_of(rank) for rank in range(world.world_size)])
    mine = slice(8 * world.rank, 8 * world.rank + 8)
    assert y.tobytes() == BatchNormalization(name="one")(union, training=True)[mine].tobytes()
    return _state(bn)


@body()
def backward_refuses_to_guess(world: World) -> object:
    """More than one call waits: every rank is told of `vjp`, before anything is exchanged, and can go on."""
    bn = BatchNormalization(name="bn", synchronized=True, collective=world)
    x = rows_of(world.rank)
    bn(x, training=True)
    bn(2 * x, training=True)
    with pytest.raises(RuntimeError, match=r"there were 2 since .* y, pullback = layer\.vjp\(x, training=True\)"):
        bn.backward(x)
    bn(x, training=True)
    return as_text(bn.backward(np.zeros_like(x)))


@body()
def local_gradients_add_up(world: World) -> object:
    """`grad_reduction="local"`: a handle gives this rank's share, as `backward` does."""
    gradients_of: list[NDArray[Any]] = []
    for reduction in ("global", "local"):
        bn = BatchNormalization(
            name=reduction,
            synchronized=True,
            collective=world,
            dtype="float64",
            grad_reduction="global" if reduction == "global" else "local",
        )
        batch = Batch.of(0, "normal", False, world)
        _, dgamma, _ = batch.call(bn, batch.mine)[1](batch.dy[batch.mine])
        assert dgamma is not None
        gradients_of.append(dgamma)
    (total,) = world.allreduce([gradients_of[1]])
    np.testing.assert_allclose(total, gradients_of[0], rtol=1e-12, atol=1e-12)
    return as_text(gradients_of[0])
