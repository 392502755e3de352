"""The result of an operation: kept until every rank has moved on, so that a repeated request gets the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bnlayer.collective import CHECKPOINT, Call, Operation, PlainSignature
from bnlayer.state import LayerState
from bnserver.core.effects import Broadcast, Checkpoint, Effect, Enrolled, Reduce, Released, Totals
from bnserver.core.events import Arrays, Body

_NO_RECIPIENTS = ()  # an answer is made before its recipients are known


class DisagreementError(Exception):
    """The ranks agree with each other, but not with the owner or with what they announced; the text says what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The result of one operation.

    Attributes:
        sequence: the operation's number within the generation.
        call: the one of all ranks.
        result: the effect that sends it, without its recipients.
    """

    sequence: int
    call: Call
    result: Totals | Enrolled | Reduce | Broadcast | Released | Checkpoint

    def to(self, connections: Mapping[int, int]) -> list[Effect]:
        """The effect that sends the answer to some ranks.

        Args:
            connections: their numbers, by rank.
        """
        effects: list[Effect] = []
        if isinstance(self.result, Broadcast) and isinstance(self.call.signature, PlainSignature):
            root = self.call.signature.root
            if root in connections:
                effects.append(Released((connections[root],), self.sequence))
            connections = {rank: connection for rank, connection in connections.items() if rank != root}
        if connections:
            effects.append(replace(self.result, connections=tuple(connections.values())))
        return effects


def plain(sequence: int, call: Call, bodies: Mapping[int, Body]) -> Answer:
    """The answer to a plain operation.

    Args:
        sequence: its number.
        call: the one of all ranks.
        bodies: what each rank contributed.

    Raises:
        DisagreementError: the contributions are not what the call announced.
    """
    signature = call.signature
    assert isinstance(signature, PlainSignature)
    if call.operation is Operation.BARRIER:
        return Answer(sequence, call, Released(_NO_RECIPIENTS, sequence))
    if call.operation is Operation.BROADCAST:
        body = bodies[signature.root]
        if not isinstance(body, tuple):
            raise DisagreementError(f"The root of the broadcast, rank {signature.root}, sent no arrays.")
        return Answer(sequence, call, Broadcast(_NO_RECIPIENTS, sequence, body))
    contributions = tuple(body for _, body in sorted(bodies.items()) if isinstance(body, tuple))
    kinds = {_described(arrays) for arrays in contributions}
    if len(kinds) > 1:
        raise DisagreementError(f"The ranks sent different arrays to the allreduce: {'; '.join(sorted(kinds))}.")
    return Answer(sequence, call, Reduce(_NO_RECIPIENTS, sequence, signature.op, contributions))


def is_checkpoint(call: Call) -> bool:
    """Whether a call asks the owner to keep its state."""
    signature = call.signature
    return call.operation is Operation.BARRIER and isinstance(signature, PlainSignature) and signature.op == CHECKPOINT


def checkpoint(sequence: int, call: Call, job: str, layers: Mapping[str, LayerState]) -> Answer:
    """The answer to a checkpoint. A rank that asks for it again has it written again: it is the same.

    Args:
        sequence: its number.
        call: the one of all ranks.
        job: the job's name.
        layers: the owner's states.
    """
    assert isinstance(call.signature, PlainSignature)
    name, step = call.signature.arrays
    return Answer(sequence, call, Checkpoint(_NO_RECIPIENTS, sequence, job, name, int(step), layers))


def _described(arrays: Arrays) -> str:
    return ", ".join(f"{array.dtype.name}{list(array.shape)}" for array in arrays) or "no arrays"
