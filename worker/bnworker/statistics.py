"""What a world has exchanged so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from bnlayer.collective import Call, Direction, Operation

Kind = tuple[str | None, Direction | None, Operation]


@dataclass(slots=True)
class Statistics:
    """Counters of one rank, kept by its world.

    Attributes:
        exchanges: completed exchanges by (layer, direction, operation); layer and direction are None for plain
            operations.
        bytes_sent: of arrays and limbs handed to the transport, before its framing.
        bytes_received: of arrays and limbs that it returned.
        waiting_seconds: spent inside exchanges, waiting for other ranks and for the wire.
    """

    exchanges: Counter[Kind] = field(default_factory=Counter)
    bytes_sent: int = 0
    bytes_received: int = 0
    waiting_seconds: float = 0.0

    def completed(self, call: Call, received: int) -> None:
        """Count one completed exchange that brought so many bytes."""
        self.exchanges[call.key.layer, call.key.direction, call.operation] += 1
        self.bytes_received += received
