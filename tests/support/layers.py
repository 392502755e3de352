"""Short ways to ask a layer, and a world for it."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.collective import Alone


class ByExchange(Alone):
    """A world of one that the layer does not know for one: it goes by way of an exchange."""


def gradients(bn: BatchNormalization) -> tuple[NDArray[Any], NDArray[Any]]:
    """The gradients of gamma and beta after a backward pass."""
    vectors = [variable.gradient for variable in (bn.gamma, bn.beta) if variable is not None]
    gamma, beta = vectors
    assert gamma is not None
    assert beta is not None
    return gamma, beta
