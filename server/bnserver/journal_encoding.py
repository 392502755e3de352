"""Encodes the core's journal records as bytes on disk, and decodes them; and the frames that hold them in a file.

A frame is a head and a body. The head holds the frame's number within its file, the body's length and checksum, and a
checksum of itself: so a truncated frame is distinguished from a corrupt one, and a frame that was removed, repeated or
moved is detected.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import assert_never
from zlib import crc32

from google.protobuf.message import DecodeError

from bnlayer.agreement import Peer
from bnlayer.state import LayerState
from bnproto.arrays import named, payload_of, unpack
from bnproto.calls import call_of, contribution_of, with_state, without_state
from bnproto.v1 import journal_pb2 as pb
from bnproto.v1 import statistics_pb2 as wire
from bnserver.core.events import Elastic, Replacing
from bnserver.core.journal_records import (
    Began,
    Completed,
    Ended,
    JournalRecord,
    LayerSnapshot,
    Left,
    MemberRecord,
    Pushed,
)
from bnserver.core.reasons import Reason

_HEAD = struct.Struct("<QIII")  # the frame's number, the body's length and crc32, the crc32 of these three
_OF_HEAD = struct.Struct("<QII")

_REASONS = {reason: wire.ErrorReason.Value(f"ERROR_REASON_{reason.value}") for reason in Reason}
_FROM_REASONS: dict[int, Reason | None] = {number: reason for reason, number in _REASONS.items()}
_FROM_REASONS[wire.ERROR_REASON_UNSPECIFIED] = None


class FrameError(ValueError):
    """A frame is corrupt."""


class RecordError(ValueError):
    """A frame is sound, but this version does not know its content."""


@dataclass(frozen=True, slots=True)
class Torn:
    """The end of a file lacks the rest of its last frame.

    Attributes:
        start: where that frame begins.
        length: how many bytes of it are there.
    """

    start: int
    length: int


def framed(number: int, body: bytes) -> bytes:
    """One frame.

    Args:
        number: of the frame within its file, from 0.
        body: what it holds.
    """
    head = _OF_HEAD.pack(number, len(body), crc32(body))
    return b"".join((head, struct.pack("<I", crc32(head)), body))


def frames(data: bytes) -> Iterator[tuple[int, bytes] | Torn]:
    """The bodies of a file's frames, each with where the next one begins; a torn one is the last.

    Raises:
        FrameError: a frame is corrupt.
    """
    start = number = 0
    while start < len(data):
        if len(data) - start < _HEAD.size:
            yield Torn(start, len(data) - start)
            return
        written, length, checksum, own = _HEAD.unpack_from(data, start)
        if own != crc32(data[start : start + _OF_HEAD.size]) or written != number:
            raise FrameError(f"the record {number}, at byte {start}, does not begin as one")
        end = start + _HEAD.size + length
        if end > len(data):
            yield Torn(start, len(data) - start)
            return
        body = data[start + _HEAD.size : end]
        if crc32(body) != checksum:
            raise FrameError(f"the checksum of record {number}, at byte {start}, does not match its content")
        yield end, body
        start, number = end, number + 1


def encode(record: JournalRecord) -> bytes:
    """A record as the body of a frame."""
    match record:
        case LayerSnapshot():
            encoded = pb.Record(snapshot=_kept(record.layer, record.state))
        case Began():
            members = [
                pb.MemberRecord(
                    rank=each.peer.rank,
                    host=each.peer.host,
                    pid=each.peer.pid,
                    incarnation=each.incarnation,
                    timeout=each.timeout,
                    pushes=each.pushes,
                )
                for each in record.members
            ]
            began = pb.Began(generation=record.generation, world_size=record.world_size, members=members)
            if record.elastic is not None:
                began.min_ranks, began.max_ranks = record.elastic.minimum, record.elastic.maximum
            encoded = pb.Record(began=began)
        case Completed():
            body = record.body
            match body:
                case LayerState():
                    arrays = body.arrays()
                case Replacing():
                    arrays = with_state(body.limbs, body.state)
                case _:
                    arrays = {"": body}
            payload = payload_of(arrays.values(), tuple(arrays))
            operation = contribution_of(record.call, payload, record.sequence, 0)
            encoded = pb.Record(operation=operation, known=record.known)
        case Pushed():
            kept = _kept(record.layer, record.state)
            encoded = pb.Record(pushed=pb.Pushed(rank=record.rank, number=record.number, layer=kept))
        case Left():
            encoded = pb.Record(left=pb.Left(generation=record.generation, rank=record.rank, reason=record.reason))
        case Ended():
            reason = _REASONS[record.reason] if record.reason is not None else wire.ERROR_REASON_UNSPECIFIED
            ended = pb.Ended(generation=record.generation, reason=reason, text=record.text, ranks=record.ranks)
            encoded = pb.Record(ended=ended)
        case _:
            assert_never(record)
    return encoded.SerializeToString()


def is_over(bodies: Iterable[bytes]) -> bool:
    """Whether the records of a whole snapshot are those of a job that is over, without decoding any of its arrays."""
    try:
        kinds = {pb.Record.FromString(body).WhichOneof("record") for body in bodies}
    except DecodeError:
        return False
    return "ended" in kinds and kinds <= {"header", "ended", "snapshot"}


def encode_header(header: pb.Header) -> bytes:
    """The body of a file's first frame."""
    return pb.Record(header=header).SerializeToString()


def decode(body: bytes) -> JournalRecord | pb.Header:
    """The record that `encode` made bytes of; a header as it is.

    Raises:
        RecordError: this version does not know it.
    """
    try:
        encoded = pb.Record.FromString(body)
        return _decoded(encoded)
    except (DecodeError, ValueError, KeyError) as error:
        raise RecordError(f"a record makes no sense: {error}") from error


def _decoded(encoded: pb.Record) -> JournalRecord | pb.Header:
    match encoded.WhichOneof("record"):
        case "header":
            return encoded.header
        case "snapshot":
            return LayerSnapshot(encoded.snapshot.layer, _state(encoded.snapshot))
        case "began":
            began = encoded.began
            members = tuple(
                MemberRecord(Peer(each.rank, each.host, each.pid), each.incarnation, each.timeout, each.pushes)
                for each in began.members
            )
            elastic = Elastic(began.min_ranks, began.max_ranks) if began.max_ranks else None
            return Began(began.generation, began.world_size, members, elastic)
        case "operation":
            return _operated(encoded.operation, encoded.known)
        case "pushed":
            pushed = encoded.pushed
            return Pushed(pushed.rank, pushed.number, pushed.layer.layer, _state(pushed.layer))
        case "left":
            return Left(encoded.left.generation, encoded.left.rank, encoded.left.reason)
        case "ended":
            ended = encoded.ended
            return Ended(ended.generation, _FROM_REASONS[ended.reason], ended.text, tuple(ended.ranks))
        case other:
            raise ValueError(f"expected an entry that this version knows, found {other}")


def _operated(message: wire.Contribution, known: bool) -> Completed:
    call, payload, dtype = call_of(message), message.payload, message.layer_signature.dtype
    if message.operation == wire.OPERATION_ENROLL:
        return Completed(message.sequence, call, LayerState.from_arrays(named(payload, payload.data), dtype), known)
    if message.layer_signature.state:
        limbs, state = without_state(named(payload, payload.data), dtype)
        return Completed(message.sequence, call, Replacing(limbs, state))
    (limbs,) = unpack(payload, payload.data)
    return Completed(message.sequence, call, limbs)


def _kept(layer: str, state: LayerState) -> pb.LayerSnapshot:
    arrays = state.arrays()
    return pb.LayerSnapshot(layer=layer, dtype=state.forward.dtype, state=payload_of(arrays.values(), tuple(arrays)))


def _state(kept: pb.LayerSnapshot) -> LayerState:
    return LayerState.from_arrays(named(kept.state, kept.state.data), kept.dtype)
