"""The service's core as its tests use it: ranks that join and enroll, and what they are told."""

from __future__ import annotations

import numpy as np

from bnlayer.agreement import Peer
from bnlayer.collective import Call, ExchangeKey, LayerSignature, Operation
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.state import LayerState
from bnserver.core.effects import Effect, Record
from bnserver.core.events import Contribute, Event, Join
from bnserver.core.journal_records import LayerSnapshot
from bnserver.core.layers import Layers
from bnserver.core.service import Service

SIGNATURE = LayerSignature(1, "float32", 0.9, 0.001)
STATE = LayerState(
    Moving(np.zeros(1, np.float32), np.ones(1, np.float32)),
    Grid.unknown("float32", 1),
    BackwardGrid.unknown("float32", 1),
)


def join(service: Service, *connections: int, job: str = "j") -> list[Effect]:
    """Join ranks, one for each connection, to a job; what they are told, and what is saved."""
    requests = [Join(s, job, Peer(rank, "h", s), len(connections), 9.0, 9.0) for rank, s in enumerate(connections)]
    return [effect for request in requests for effect in effects_of(service, request)]


def enroll(service: Service, connection: int, generation: int = 1) -> list[Effect]:
    """Enroll the layer "a"."""
    call = Call(Operation.ENROLL, ExchangeKey("a", None, 0), SIGNATURE)
    return effects_of(service, Contribute(connection, generation, 1, call, STATE))


def effects_of(service: Service, event: Event, now: float = 0.0) -> list[Effect]:
    """What the ranks are told, and what is saved; not what the service does for itself."""
    return [effect for effect in service.handle(event, now) if not isinstance(effect, Record)]


def layers_with_one() -> Layers:
    """Layers of a job that has "a"."""
    layers = Layers()
    layers.keep(LayerSnapshot("a", STATE))
    return layers
