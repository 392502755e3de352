"""What can go wrong between ranks, named by whose fault it is.

Every rank that is still alive gets one of these, with the same text, when an exchange cannot complete.
"""

from __future__ import annotations

from typing import Self


class CollectiveError(RuntimeError):
    """An exchange between ranks could not complete.

    After one of these the world is broken: every later exchange raises it again at once.

    Attributes:
        ranks: the ranks the text blames, ascending; empty when no rank is to blame.
        layer: the layer of the exchange; None for a plain reduction, broadcast or barrier.
        step: how many exchanges of this layer and direction came before, from 0; None outside an exchange.
    """

    def __init__(
        self, message: str, *, ranks: tuple[int, ...] = (), layer: str | None = None, step: int | None = None
    ) -> None:
        super().__init__(message)
        self.ranks = tuple(sorted(ranks))
        self.layer = layer
        self.step = step

    def copy_for_raise(self) -> Self:
        """A fresh exception of the same kind and content, to be raised by a later exchange."""
        return type(self)(str(self), ranks=self.ranks, layer=self.layer, step=self.step)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), str(self), self.ranks, self.layer, self.step)


def _rebuild(
    kind: type[CollectiveError], message: str, ranks: tuple[int, ...], layer: str | None, step: int | None
) -> CollectiveError:
    return kind(message, ranks=ranks, layer=layer, step=step)


class MismatchError(CollectiveError):
    """The ranks disagree: on a layer's shape, dtype, mode, mask or configuration, or on a reduction."""


class StallError(CollectiveError):
    """The ranks wait for each other: in different layers, at different steps, or for one that has left."""


class PeerLostError(CollectiveError):
    """A rank crashed, failed or froze."""


class RegroupError(PeerLostError):
    """The ranks of an elastic job change, by a loss or by ranks that join: those that are left join anew."""


class ServiceError(CollectiveError):
    """The statistics service refuses, or stays away."""


class JobFinishedError(ServiceError):
    """An elastic job was finished by the other ranks before this one had joined it, or while it was away."""
