"""What ranks do to disagree; `odd` is whether this one does something else than the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization
from bnworker import World
from support.contract.registry import rows_of


def layer(world: World, name: str = "bn", **options: Any) -> BatchNormalization:
    """A synchronized layer of this world."""
    return BatchNormalization(name=name, synchronized=True, collective=world, **options)


def train(bn: BatchNormalization, world: World, mask: bool = False, channels: int = 4) -> None:
    """One forward pass in training mode."""
    x = rows_of(world.rank, channels=channels)
    bn(x, training=True, mask=np.ones(len(x), bool) if mask else None)


def different_layers(world: World, odd: bool) -> None:
    """They begin with different layers."""
    train(layer(world, "b" if odd else "a"), world)


def different_order(world: World, odd: bool) -> None:
    """They know the same layers, and call them in another order."""
    a, b = layer(world, "a"), layer(world, "b")
    train(a, world)
    train(b, world)
    train(b if odd else a, world)


def skipped_backward(world: World, odd: bool) -> None:
    """One forgets the backward pass."""
    bn = layer(world)
    train(bn, world)
    if odd:
        train(bn, world)
    else:
        bn.backward(rows_of(world.rank))


def extra_step(world: World, odd: bool) -> None:
    """One makes a step more before all meet elsewhere."""
    bn = layer(world)
    train(bn, world)
    if not odd:
        world.barrier()
    else:
        train(bn, world)


def evaluating(world: World, odd: bool) -> None:
    """One calls a layer in inference mode, and goes on to the next."""
    a, b = layer(world, "a"), layer(world, "b")
    train(a, world)
    train(b, world)
    a(rows_of(world.rank), training=not odd)
    train(b, world)


def frozen(world: World, odd: bool) -> None:
    """One has frozen a layer, and goes on to the next."""
    a, b = layer(world, "a"), layer(world, "b")
    train(a, world)
    train(b, world)
    a.trainable = not odd
    train(a, world)
    train(b, world)


def skipped_layer(world: World, odd: bool) -> None:
    """One leaves out the middle of three layers."""
    a, b, c = (layer(world, name) for name in "abc")
    for bn in (a, b, c, a):
        train(bn, world)
    train(c if odd else b, world)


def extra_layer(world: World, odd: bool) -> None:
    """One has a layer more than the others."""
    a, b = layer(world, "a"), layer(world, "b")
    train(a, world)
    if odd:
        train(layer(world, "extra"), world)
    train(b, world)


def different_masks(world: World, odd: bool) -> None:
    """One has a mask."""
    bn = layer(world)
    train(bn, world)
    train(bn, world, mask=odd)


def one_restores(world: World, odd: bool) -> None:
    """One takes over another grid."""
    bn = layer(world)
    train(bn, world)
    if odd:
        other = BatchNormalization(name="other")
        other(np.full((2, 4), 5.0, np.float32), training=True)
        state = bn.state
        bn.restore(type(state)(state.moving, other.state.forward, state.backward))
    train(bn, world)


def early_return(world: World, odd: bool) -> None:
    """One has a step less, and leaves."""
    bn = layer(world)
    with world:
        train(bn, world)
        if not odd:
            train(bn, world)


def failure(world: World, odd: bool) -> None:
    """One fails with an exception, which its `with` block lets through."""
    bn = layer(world)
    train(bn, world)
    if not odd:
        train(bn, world)
        return
    with pytest.raises(ValueError, match="no such file"), world:
        raise ValueError("no such file\nand more")


def failing_exit(world: World, odd: bool) -> None:
    """One exits with a code."""
    if not odd:
        world.allreduce([1.0])
        return
    with pytest.raises(SystemExit), world:
        raise SystemExit(3)


def successful_exit(world: World, odd: bool) -> None:
    """One exits as if all was done."""
    if not odd:
        world.barrier()
        return
    with pytest.raises(SystemExit), world:
        raise SystemExit(0)


def different_calls(world: World, odd: bool) -> None:
    """Two calls wait for their gradients; one pulls back the second of them first."""
    bn = layer(world)
    handles = [bn.vjp(rows_of(world.rank), training=True)[1] for _ in range(2)]
    handles[odd](rows_of(world.rank))


def one_does_not_update(world: World, odd: bool) -> None:
    """One computes a call once more, the others train."""
    bn = layer(world)
    train(bn, world)
    bn(rows_of(world.rank), training=True, update_moving=not odd)


def push_on_one(world: World, odd: bool) -> None:
    """One replaces its statistics, the others don't."""
    bn = layer(world)
    train(bn, world)
    if odd:
        world.push(bn)
    train(bn, world)


def set_on_one(world: World, odd: bool) -> None:
    """One sets its moving mean."""
    bn = layer(world)
    train(bn, world)
    if odd:
        bn.moving_mean.assign(np.zeros(4))
    train(bn, world)


def set_differently(world: World, odd: bool) -> None:
    """All set it, one to something else."""
    bn = layer(world)
    train(bn, world)
    bn.moving_mean.assign(np.full(4, float(odd)))
    train(bn, world)


def set_before_backward(world: World, odd: bool) -> None:
    """One sets it between a call and its backward pass."""
    bn = layer(world)
    train(bn, world)
    if odd:
        bn.moving_mean.assign(np.zeros(4))
    bn.backward(rows_of(world.rank))


def weights_on_one(world: World, odd: bool) -> None:
    """One goes back to earlier weights."""
    bn = layer(world)
    train(bn, world)
    if odd:
        bn.set_weights(bn.get_weights())
    train(bn, world)


def other_weights(world: World, odd: bool) -> None:
    """One begins with another gamma."""
    bn = layer(world)
    bn.build((None, 4))
    assert bn.gamma is not None
    bn.gamma.assign(np.full(4, 1.0 + odd))
    train(bn, world)


DESCRIBED = "{}: 4 channels in float32 with float32 variables, gamma and beta, synchronized"


def synchronize_others(world: World, odd: bool) -> None:
    """One synchronizes fewer layers."""
    made = [layer(world, name) for name in "ab"]
    for bn in made:
        bn.build((None, 4))
    world.synchronize(made[: 1 if odd else 2])
