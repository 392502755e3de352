"""Translates the wire's messages into the core's events, and its effects into messages. No decisions.

What comes out of `Reader` is valid by itself: `core.validation` looks at it on the way.
"""

from __future__ import annotations

import math
from dataclasses import replace

from bnlayer.agreement import Peer, shown
from bnlayer.collective import LayerSignature, Operation
from bnlayer.state import LayerState
from bnproto.arrays import WireError, named, pack, unpack
from bnproto.calls import call_of, without_state
from bnproto.v1 import statistics_pb2 as pb
from bnserver.core.effects import Broadcast, Enrolled, Failed, Owned, Released, Totals
from bnserver.core.events import (
    Arrays,
    Body,
    Contribute,
    Elastic,
    Event,
    Join,
    Leave,
    Malformed,
    Pull,
    Push,
    Replacing,
    Resume,
)
from bnserver.core.members import LivenessTimeouts
from bnserver.core.quotas import QuotaError, Quotas, exceeded
from bnserver.core.reasons import Reason
from bnserver.core.validation import NAME_CHARACTERS, validated
from bnserver.rank_channel import Outgoing

Messages = list[Outgoing]

_ROWS = 10  # that arrays of a layer have at most: limbs of sums in float64
_LAYERS = "layers of a job"
_FLAGS = "flags"  # of a state: as many as there are, whatever its channels
# Each takes some microseconds to read, with or without elements: a message has room for half a second of them.
_ARRAYS = 2**14

_REASONS = {
    Reason.MISMATCH: pb.ERROR_REASON_MISMATCH,
    Reason.STALL: pb.ERROR_REASON_STALL,
    Reason.PEER_LOST: pb.ERROR_REASON_PEER_LOST,
    Reason.DEADLINE: pb.ERROR_REASON_DEADLINE,
    Reason.INVALID: pb.ERROR_REASON_INVALID,
    Reason.STOPPING: pb.ERROR_REASON_STOPPING,
    Reason.STALE: pb.ERROR_REASON_STALE_GENERATION,
    Reason.QUOTA: pb.ERROR_REASON_QUOTA,
    Reason.DATA_LOSS: pb.ERROR_REASON_DATA_LOSS,
    Reason.INTERNAL: pb.ERROR_REASON_INTERNAL,
    Reason.REGROUP: pb.ERROR_REASON_REGROUP,
    Reason.FINISHED: pb.ERROR_REASON_FINISHED,
}


class Reader:
    """Turns one connection's requests into valid events.

    Args:
        connection: its number.
        quotas: of ranks and channels.
    """

    def __init__(self, connection: int, quotas: Quotas | None = None) -> None:
        self._connection = connection
        self._quotas = quotas or Quotas()
        self._joined: Join | None = None
        self._world_size = 0

    def joined(self, world_size: int) -> None:
        """The rank is in a generation of so many ranks."""
        self._world_size = world_size

    def read(self, request: pb.ExchangeRequest, data: bytes | bytearray) -> Event:
        """The event of a request; `Malformed` if it is invalid.

        Args:
            request: its first message.
            data: all bytes of its payload.
        """
        kind = request.WhichOneof("message")
        try:
            if (kind == "join") is (self._joined is not None):
                raise WireError("expected one join, as the first request of a stream")
            match kind:
                case "contribution":
                    return self._contribution(request.contribution, data)
                case "join":
                    self._joined = self._join(request.join)
                    return validated(self._joined)
                case "push":
                    push = request.push
                    self._check_channels(push.payload)
                    state = LayerState.from_arrays(named(push.payload, data), push.dtype)
                    return validated(Push(self._connection, push.layer, state, push.number))
                case "pull":
                    return validated(Pull(self._connection, request.pull.layer))
                case "leave":
                    return validated(Leave(self._connection, shown(request.leave.reason)))
                case _:
                    raise WireError(f"expected a request, received {kind or 'an empty message'}")
        except QuotaError as error:
            return Malformed(self._connection, str(error), reason=Reason.QUOTA)
        except (ValueError, KeyError) as error:
            return Malformed(self._connection, str(error))

    def _check_channels(self, payload: pb.Payload) -> None:
        """Before any array is made: the arrays of a layer have as many columns as it has channels."""
        channels = 0
        for array in payload.arrays:
            if array.name != _FLAGS and array.shape:
                channels = max(channels, array.shape[-1], math.prod(array.shape) // _ROWS)
        if channels > self._quotas.channels:
            raise self._too_many(channels)

    def _too_many(self, channels: int) -> QuotaError:
        return QuotaError(exceeded("channels of a layer", self._quotas.channels, channels, "--max-channels"))

    def _join(self, join: pb.Join) -> Join:
        if join.token:
            raise WireError("expected no token, which this version of the service would not check, received one")
        resume = None
        if join.HasField("resume"):
            sent = join.resume
            if len(sent.versions) > self._quotas.layers:  # before they are copied: a rank may wait here for long
                raise QuotaError(exceeded(_LAYERS, self._quotas.layers, len(sent.versions), "--max-layers"))
            if any(len(name) > NAME_CHARACTERS for name in sent.versions):
                raise WireError(f"expected names of layers of up to {NAME_CHARACTERS} characters, received longer ones")
            resume = Resume(sent.generation, sent.sequence, sent.layer_sequence, dict(sent.versions))
        if join.world_size > self._quotas.ranks:
            raise QuotaError(exceeded("ranks of a job", self._quotas.ranks, join.world_size, "--max-ranks"))
        peer = Peer(join.rank, shown(join.host), join.pid)
        timeouts = join.join_timeout_ms / 1000, join.timeout_ms / 1000
        event = Join(self._connection, join.job, peer, join.world_size, *timeouts, join.incarnation, resume)
        if not join.HasField("elastic"):
            return event
        given = join.elastic
        elastic = Elastic(given.min, given.max)
        return replace(event, elastic=elastic, previous_generation=given.generation, restarted=given.restarted)

    def _contribution(self, message: pb.Contribution, data: bytes | bytearray) -> Event:
        assert self._joined is not None
        number = max(len(message.payload.arrays), len(message.plain_signature.arrays))
        if number > _ARRAYS:
            raise WireError(f"expected at most {_ARRAYS} arrays in one contribution, received {number}")
        call = call_of(message)
        body: Body
        if isinstance(call.signature, LayerSignature):
            if call.signature.channels > self._quotas.channels:
                raise self._too_many(call.signature.channels)
            if call.operation is Operation.ENROLL or call.signature.state:  # of limbs no copy is made
                self._check_channels(message.payload)
        if call.operation is Operation.ENROLL and isinstance(call.signature, LayerSignature):
            body = LayerState.from_arrays(named(message.payload, data), call.signature.dtype)
        elif isinstance(call.signature, LayerSignature) and call.signature.state:
            body = Replacing(*without_state(named(message.payload, data), call.signature.dtype))
        elif call.operation in (Operation.PROBE, Operation.SUMS):
            arrays = unpack(message.payload, data)
            if len(arrays) != 1:
                raise WireError(f"expected one array of limbs, received {len(arrays)}")
            body = arrays[0]
        elif message.HasField("payload"):
            body = tuple(unpack(message.payload, data))
        else:
            body = None
        contribution = Contribute(self._connection, message.generation, message.sequence, call, body)
        return validated(contribution, self._world_size or self._joined.world_size)


class Writer:
    """Turns effects into the responses of one run of the service.

    Args:
        boot_id: names this run.
        timeouts: how long it waits for signs of life.
        durable: whether jobs survive it.
    """

    def __init__(self, boot_id: int, timeouts: LivenessTimeouts, *, durable: bool) -> None:
        self._boot_id = boot_id
        self._lease_ms = round(timeouts.lease * 1000)
        self._durable = durable

    def joined(
        self, generation: int, world_size: int, local_socket: pb.LocalSocket | None, rank: int | None = None
    ) -> Messages:
        """The response once all ranks have joined."""
        message = pb.Joined(
            world_size=world_size, lease_ms=self._lease_ms, durable=self._durable, local_socket=local_socket, rank=rank
        )
        return [Outgoing(pb.ExchangeResponse(boot_id=self._boot_id, generation=generation, joined=message))]

    def heartbeat(self) -> pb.HeartbeatResponse:
        """The answer to a sign of life."""
        return pb.HeartbeatResponse(boot_id=self._boot_id)

    def result(self, effect: Totals | Enrolled | Broadcast | Released, generation: int) -> Messages:
        """The answer to a contribution."""
        version: int | None = None
        known = False
        names: tuple[str, ...] = ()
        arrays: Arrays
        match effect:
            case Totals():
                version, arrays = effect.version, (effect.limbs,)
            case Enrolled():
                state = effect.state.arrays()
                version, names, arrays = effect.state.version, tuple(state), tuple(state.values())
                known = effect.known
            case Broadcast():
                arrays = effect.arrays
            case Released():
                return self._messages(generation, pb.Result(sequence=effect.sequence), [])
        payload, parts = pack(arrays, names)
        result = pb.Result(sequence=effect.sequence, version=version, payload=payload, known=known)
        return self._messages(generation, result, parts)

    def reduced(self, sequence: int, generation: int, arrays: Arrays) -> Messages:
        """The answer to a plain reduction."""
        payload, parts = pack(arrays)
        return self._messages(generation, pb.Result(sequence=sequence, payload=payload), parts)

    def overflowed(self, sequence: int, generation: int, text: str) -> Messages:
        """The answer to an integer sum that does not fit its dtype."""
        return self._messages(generation, pb.Result(sequence=sequence, overflow=text), [])

    def checkpointed(self, sequence: int, generation: int, refused: str) -> Messages:
        """The answer to a checkpoint; why it is not kept, or ""."""
        return self._messages(generation, pb.Result(sequence=sequence, refused=refused), [])

    def owned(self, effect: Owned, generation: int) -> Messages:
        """The answer to a pull or a push."""
        message, parts = pb.Owned(), list[pb.Part]()
        if effect.state is not None:
            state = effect.state.arrays()
            payload, parts = pack(state.values(), tuple(state))
            message = pb.Owned(known=True, dtype=effect.state.forward.dtype, payload=payload)
        return self._messages(generation, message, parts)

    def _messages(self, generation: int, answer: pb.Result | pb.Owned, parts: list[pb.Part]) -> Messages:
        if isinstance(answer, pb.Result):
            first = pb.ExchangeResponse(boot_id=self._boot_id, generation=generation, result=answer)
        else:
            first = pb.ExchangeResponse(boot_id=self._boot_id, generation=generation, owned=answer)
        rest = (pb.ExchangeResponse(boot_id=self._boot_id, generation=generation, part=part) for part in parts)
        return [Outgoing(first, answer.payload.size), *map(Outgoing, rest)]


def failure_of(effect: Failed) -> pb.Failure:
    """The wire's failure for an effect that ends a connection."""
    return pb.Failure(
        reason=_REASONS[effect.reason],
        text=effect.text,
        ranks=effect.ranks,
        layer=effect.layer,
        step=effect.step,
    )
