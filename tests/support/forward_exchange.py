"""A rank's forward exchange written out, one contribution after the other, on the reference kernels.

For ranks that are not threads: whoever plays them decides when a contribution is sent, and when its total arrives. That
is why these do not call the layer's own `ExchangeDriver`, which returns when an exchange is over.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bnlayer.collective import Call, ExchangeKey, LayerSignature, Operation
from bnlayer.exchange import ForwardExchange
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import reference
from bnlayer.moving import Moving
from bnlayer.state import LayerState


def unprobed_state(channels: int) -> LayerState:
    """The state of a new layer: mean 0, variance 1, no grid yet."""
    moving = Moving(np.zeros(channels, np.float32), np.ones(channels, np.float32))
    return LayerState(moving, Grid.unknown("float32", channels), BackwardGrid.unknown("float32", channels))


def bits(state: LayerState) -> bytes:
    """All that a state holds."""
    return b"".join(array.tobytes() for array in state.arrays().values())


def contribution(
    exchange: ForwardExchange,
    key: ExchangeKey,
    signature: LayerSignature,
    x: NDArray[np.float32],
    mask: NDArray[np.bool_] | None = None,
) -> tuple[Call, NDArray[np.int64]]:
    """What a rank sends next: the call, and the limbs of its rows.

    Args:
        exchange: which is not over.
        key: of the exchange.
        signature: the layer's; grid and mask are set here.
        x: (A, C, B).
        mask: of x, or None.
    """
    assert exchange.wants is not None
    full_signature = replace(signature, masked=mask is not None, grid=exchange.fingerprint)
    return Call(exchange.wants, key, full_signature, exchange.attempt), limbs_of(exchange, x, mask)


def limbs_of(
    exchange: ForwardExchange, x: NDArray[np.float32], mask: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """The limbs of rows, for what the exchange asks for."""
    kernel = reference.probe if exchange.wants is Operation.PROBE else reference.moments
    return kernel(x, mask, exchange.grid)
