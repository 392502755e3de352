"""What is put on the wire comes off it; what has no meaning is refused."""

from dataclasses import fields, replace
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from numpy.typing import NDArray

from bnlayer.agreement import Peer
from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.errors import MismatchError, PeerLostError, ServiceError, StallError
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.moving import Moving
from bnlayer.renorm import Renorm
from bnlayer.state import LayerState
from bnproto.arrays import PayloadAssembler, WireError, pack, unpack
from bnproto.calls import call_of, contribution_of, with_state
from bnproto.failures import error_of, failure_in, status_of
from bnproto.grpc_options import CLIENT_OPTIONS, PART_BYTES, SERVER_OPTIONS, SERVICE_NAME
from bnproto.v1 import statistics_pb2 as pb
from bnserver.connection import Connection
from bnserver.core.events import Contribute, Event, Join, Leave, Malformed, Push, Replacing, Resume
from bnserver.core.reasons import Reason
from bnserver.grpc_channel import GrpcChannel
from bnserver.rank_channel import RequestAssembler
from bnserver.translation import _REASONS, Reader

_RENORM = Renorm(0.9, rmax=3.0, dmax=0.0)
_SIGNATURE = LayerSignature(
    *(256, "float64", 0.97, 1e-5, True, _RENORM, True, True, 2**63 - 1, "mixed_float16", False),
    *(True, 2**63 - 2, 2**63 - 3, True),
)
_CALLS = [
    Call(Operation.ENROLL, ExchangeKey("a", None, 0), LayerSignature(1, "float32", 0.9, 0.001)),
    Call(Operation.PROBE, ExchangeKey("", Direction.FORWARD, 2**40), _SIGNATURE, 2),
    Call(Operation.SUMS, ExchangeKey("ü", Direction.BACKWARD, 1), _SIGNATURE, 1, 2**40),
    Call(Operation.REDUCE, ExchangeKey(None, None, 7), PlainSignature("max", ("float32[2]", "int8[]"))),
    Call(Operation.BROADCAST, ExchangeKey(None, None, 7), PlainSignature(root=3)),
    Call(Operation.BARRIER, ExchangeKey(None, None, 7), PlainSignature()),
]


def _joined(payload: pb.Payload, parts: list[pb.Part]) -> bytes | bytearray:
    """The bytes of a payload that has travelled."""
    joining = PayloadAssembler(pb.Payload.FromString(payload.SerializeToString()))
    for part in parts:
        assert not joining.complete
        joining.add(pb.Part.FromString(part.SerializeToString()))
    assert joining.complete
    return joining.data


# ---- arrays ----


@pytest.mark.parametrize("kind", "?bhilqBHILQefd")
def test_arrays_have_this_machines_byte_order(kind: str) -> None:
    """Not an explicit one that happens to be the same: the compiled kernels take native arrays only."""
    payload, parts = pack([np.zeros(3, kind)])
    (array,) = unpack(payload, _joined(payload, parts))
    assert array.dtype.byteorder in "=|"
    assert array.copy().data.format in tuple("?bhilqBHILQefd")


@pytest.mark.parametrize(
    "array",
    [
        *(np.arange(6).reshape(2, 3).astype(kind) for kind in "?bhilqBHILQefd"),
        np.array([1.5, np.nan, -np.inf], ml_dtypes.bfloat16),
        np.array(-0.0),
        np.zeros((3, 0, 2), np.float32),
        np.arange(12.0).reshape(3, 4).T,
        np.arange(5)[::-2],
        np.arange(3, dtype=">i4"),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_arrays_come_off_as_they_were(array: NDArray[Any]) -> None:
    """Every dtype that travels, whatever its layout in memory: same dtype, shape and bits."""
    payload, parts = pack([array])
    (got,) = unpack(payload, _joined(payload, parts))
    native = array.astype(array.dtype.newbyteorder("="))
    assert (got.dtype, got.shape) == (native.dtype, native.shape)
    assert got.tobytes() == native.tobytes()


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 8, PART_BYTES, PART_BYTES + 8, 5 * PART_BYTES])
def test_large_payloads_are_cut(size: int) -> None:
    """No message holds more than a part; the pieces are whole again at the other end."""
    arrays: list[NDArray[Any]] = [np.frombuffer(np.random.default_rng(0).bytes(size), np.uint8), np.arange(3)]
    payload, parts = pack(arrays)
    assert all(len(data) <= PART_BYTES for data in (payload.data, *(part.data for part in parts)))
    for got, array in zip(unpack(payload, _joined(payload, parts)), arrays, strict=True):
        assert got.tobytes() == array.tobytes()


def test_other_dtypes_do_not_travel() -> None:
    """Objects could hold anything."""
    with pytest.raises(WireError, match=r"expected arrays of bool, int8, .*; received 'object'"):
        pack([np.array([None])])


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (pb.Payload(arrays=[pb.Array(dtype="object", shape=[1])], data=bytes(8), size=8), "received 'object'"),
        (
            pb.Payload(arrays=[pb.Array(dtype="int64", shape=[2])], data=bytes(8), size=8),
            "16 bytes .* received 8",
        ),
        (pb.Payload(arrays=[pb.Array(dtype="int64", shape=[])], data=bytes(9), size=9), "8 bytes .* received 9"),
        (pb.Payload(arrays=[pb.Array(dtype="int64", shape=[2**63, 4])], data=bytes(8), size=8), "received 8"),
    ],
)
def test_headers_that_lie_are_refused(payload: pb.Payload, text: str) -> None:
    """Nothing is allocated for what a header claims."""
    with pytest.raises(WireError, match=text):
        unpack(payload, payload.data)


def test_more_bytes_than_announced_are_refused() -> None:
    """A stream of parts without an end can't fill the memory."""
    with pytest.raises(WireError, match="expected a payload of 1 bytes, received 2"):
        PayloadAssembler(pb.Payload(data=bytes(2), size=1))
    joining = PayloadAssembler(pb.Payload(data=bytes(2), size=3))
    with pytest.raises(WireError, match="expected a payload of 3 bytes, received 4"):
        joining.add(pb.Part(data=bytes(2)))


# ---- calls ----


@pytest.mark.parametrize("call", _CALLS, ids=lambda call: str(call.operation))
def test_calls_come_off_as_they_were(call: Call) -> None:
    """Every field of a call, its place and its terms."""
    message = contribution_of(call, None, 5, 3)
    got = pb.Contribution.FromString(message.SerializeToString())
    assert call_of(got) == call
    assert (got.sequence, got.generation) == (5, 3)


def test_every_term_travels() -> None:
    """A term that did not could differ between ranks, unseen: the call above sets each to another value."""
    default = LayerSignature(0, "", 0.0, 0.0)
    assert all(getattr(_SIGNATURE, field.name) != getattr(default, field.name) for field in fields(LayerSignature))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.Contribution(), r"expected one of the operations 1 \(enroll\), .*; received 0"),
        (pb.Contribution(operation=99), "received 99"),  # type: ignore[arg-type]  # from a newer client
        (pb.Contribution(operation=pb.OPERATION_SUMS, direction=9), "expected one of the directions"),  # type: ignore[arg-type]  # likewise
        (
            pb.Contribution(operation=pb.OPERATION_SUMS),
            "a layer or of a plain operation, received neither",
        ),
    ],
)
def test_unknown_enum_values_are_refused(message: pb.Contribution, text: str) -> None:
    """What a newer client may say is named, not guessed."""
    with pytest.raises(WireError, match=text):
        call_of(message)


# ---- failures ----


@pytest.mark.parametrize(
    ("reason", "kind", "code"),
    [
        (Reason.MISMATCH, MismatchError, grpc.StatusCode.FAILED_PRECONDITION),
        (Reason.STALL, StallError, grpc.StatusCode.ABORTED),
        (Reason.PEER_LOST, PeerLostError, grpc.StatusCode.ABORTED),
        (Reason.DEADLINE, PeerLostError, grpc.StatusCode.DEADLINE_EXCEEDED),
        (Reason.INVALID, ServiceError, grpc.StatusCode.INVALID_ARGUMENT),
        (Reason.STOPPING, ServiceError, grpc.StatusCode.UNAVAILABLE),
        (Reason.INTERNAL, ServiceError, grpc.StatusCode.INTERNAL),
    ],
)
def test_failures_come_off_as_they_were(reason: Reason, kind: type[Exception], code: grpc.StatusCode) -> None:
    """Class, text, ranks, layer and step, however long; and the status that other tools understand."""
    text = "ä" * 40_000
    failure = pb.Failure(reason=_REASONS[reason], text=text, ranks=[1, 4], layer="", step=0)
    status = status_of(failure)
    assert status.code is code
    assert len(status.message) == 500
    got = failure_in(status.details)
    assert got is not None
    error = error_of(got)
    assert type(error) is kind
    assert (str(error), error.ranks, error.layer, error.step) == (text, (1, 4), "", 0)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    details = status_pb2.Status.FromString(status.details).details
    assert details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason.value, SERVICE_NAME)
    assert details[-1].Unpack(retry) is (reason is Reason.STOPPING)


def test_every_reason_has_a_meaning() -> None:
    """Each reason of the protocol becomes an error, those of later versions too."""
    for name, reason in pb.ErrorReason.items():
        if reason != pb.ERROR_REASON_UNSPECIFIED:
            failure = failure_in(status_of(pb.Failure(reason=reason, text=name)).details)
            assert failure is not None
            error = error_of(failure)
            assert (str(error), error.layer, error.step) == (name, None, None)
    assert type(error_of(pb.Failure(reason=99))) is ServiceError  # type: ignore[arg-type]  # from a newer service


def test_a_status_of_somebody_else_holds_no_failure() -> None:
    """A proxy's or gRPC's own."""
    assert failure_in(status_pb2.Status(code=14, message="x").SerializeToString()) is None


def test_both_ends_ping_by_the_same_rules() -> None:
    """A client that pings more often than its server allows is cut off."""
    server, client = dict(SERVER_OPTIONS), dict(CLIENT_OPTIONS)
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < client["grpc.keepalive_time_ms"]
    assert server["grpc.so_reuseport"] == 0
    assert client["grpc.enable_http_proxy"] == 0


# ---- requests ----


def _request(call: Call, arrays: dict[str, NDArray[Any]] | None) -> tuple[pb.ExchangeRequest, list[pb.Part]]:
    payload, parts = pack(arrays.values(), tuple(arrays)) if arrays is not None else (None, [])
    return pb.ExchangeRequest(contribution=contribution_of(call, payload, 1, 1)), parts


_UNSET = _CALLS[2]._replace(signature=replace(_SIGNATURE, state=0))


class _End:
    """The service's end of a connection: what the core gets of what arrives on it."""

    def __init__(self, *, joined: bool = True) -> None:
        self._events: list[Event] = []
        self._connection = Connection(7, GrpcChannel(), self._events.append)
        self._assembler = RequestAssembler()
        if joined:
            join = pb.Join(job="j", world_size=1, timeout_ms=1, join_timeout_ms=1)
            assert isinstance(self.read(pb.ExchangeRequest(join=join)), Join)

    def read(self, message: pb.ExchangeRequest) -> Event | None:
        """The event that a message brings about; None while parts are missing."""
        assembled = self._assembler.add(message)
        if assembled is None:
            return None
        self._connection.receive(*assembled)
        return self._events.pop()


def test_a_large_enrolment_travels_in_parts() -> None:
    """A layer of very many channels; nothing is said before its last part."""
    channels = 100_000
    state = LayerState(
        Moving(np.arange(channels, dtype=np.float32), np.ones(channels, np.float32)),
        Grid.unknown("float32", channels),
        BackwardGrid.unknown("float32", channels),
        3,
    )
    call = _CALLS[0]._replace(signature=LayerSignature(channels, "float32", 0.9, 0.001))
    request, parts = _request(call, state.arrays())
    end = _End()
    assert len(parts) == sum(array.nbytes for array in state.arrays().values()) // PART_BYTES
    *early, event = [end.read(one) for one in (request, *(pb.ExchangeRequest(part=part) for part in parts))]
    assert early == [None] * len(parts)
    assert isinstance(event, Contribute)
    assert isinstance(event.body, LayerState)
    assert event.body.moving.mean.tobytes() == state.moving.mean.tobytes()
    assert event.body.version == 3


def test_a_state_that_was_set_is_read() -> None:
    """Beside the words: the same bits, and the version."""
    state = LayerState(
        Moving(np.zeros(1), np.ones(1)), Grid.unknown("float64", 1), BackwardGrid.unknown("float64", 1), 3
    )
    limbs = np.arange(10).reshape(10, 1)
    signature = LayerSignature(1, "float64", 0.9, 0.001, state=state.fingerprint)
    call = Call(Operation.SUMS, ExchangeKey("a", Direction.FORWARD, 1), signature)
    event = _End().read(_request(call, with_state(limbs, state))[0])
    assert isinstance(event, Contribute)
    assert isinstance(event.body, Replacing)
    assert event.body.limbs.tolist() == limbs.tolist()
    assert (event.body.state.fingerprint, event.body.state.version) == (state.fingerprint, 3)


def test_what_a_peer_says_is_shown_on_one_line() -> None:
    """A host's name or a reason can't forge a line of the log, nor reach a terminal with control characters."""
    reader = Reader(1)
    join = pb.Join(job="j", host="a\n\x1b[31m", world_size=1, timeout_ms=1, join_timeout_ms=1)
    joined = reader.read(pb.ExchangeRequest(join=join), b"")
    assert isinstance(joined, Join)
    assert joined.peer.host == "a\\n\\x1b[31m"
    leave = reader.read(pb.ExchangeRequest(leave=pb.Leave(reason="é\r\u202e" + "x" * 10_000)), b"")
    assert leave == Leave(1, "é\\r\\u202e" + "x" * 1_997 + "… (10003 characters)")


def test_a_push_is_read() -> None:
    """The state of a layer, by name and dtype."""
    state = LayerState(
        Moving(np.zeros(1), np.ones(1)), Grid.unknown("float64", 1), BackwardGrid.unknown("float64", 1), 3
    )
    arrays = state.arrays()
    payload, _ = pack(arrays.values(), tuple(arrays))
    event = _End().read(pb.ExchangeRequest(push=pb.Push(layer="a", dtype="float64", payload=payload)))
    assert isinstance(event, Push)
    assert (event.layer, event.state.forward.dtype, event.state.version) == ("a", "float64", 3)


def _pushed(layer: str, dtype: str, version: int = 3) -> pb.ExchangeRequest:
    moving = Moving(np.zeros(1, np.float32), np.ones(1, np.float32))
    state = LayerState(moving, Grid.unknown("float32", 1), BackwardGrid.unknown("float32", 1), version)
    payload, _ = pack(state.arrays().values(), tuple(state.arrays()))
    return pb.ExchangeRequest(push=pb.Push(layer=layer, dtype=dtype, payload=payload))


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (pb.ExchangeRequest(), "expected a request, received an empty message"),
        (pb.ExchangeRequest(attach=pb.Attach()), "expected a request, received attach"),  # it is for local sockets
        (pb.ExchangeRequest(join=pb.Join()), "expected one join, as the first request of a stream"),
        (pb.ExchangeRequest(push=pb.Push(layer="a")), "The state of a layer lacks 'moving_mean'; it has nothing."),
        (_request(_UNSET, {})[0], "expected one array of limbs, received 0"),
        (_request(_CALLS[2], {})[0], "expected limbs beside the state that was set, received nothing"),
        (
            _request(_CALLS[2], {"": np.zeros((6, 1), np.int64)})[0],
            "The state of a layer lacks 'moving_mean'; it has nothing.",
        ),
        (
            pb.ExchangeRequest(pull=pb.Pull(layer="")),
            "expected a layer name of 1 to 200 characters, received ''",
        ),
        (_pushed("", "float32"), "expected a layer name of 1 to 200 characters, received ''"),
        (_pushed("a", "foo"), "expected a state in float32 or float64, received 'foo'"),
        (_pushed("a", "float32", version=2**63 - 1), f"expected a version from 0 to 2^62, received {2**63 - 1}"),
    ],
)
def test_requests_without_a_meaning_are_malformed(request_: pb.ExchangeRequest, text: str) -> None:
    """Each is an event of its own, so that the core decides what it costs."""
    assert _End().read(request_) == Malformed(7, text)


def test_a_contribution_of_number_0_is_malformed() -> None:
    """It was taken for a repetition, and never answered."""
    request, _ = _request(Call(Operation.BARRIER, ExchangeKey(None, None, 0), PlainSignature()), None)
    request.contribution.sequence = 0
    event = _End().read(request)
    assert isinstance(event, Malformed)
    assert event.text == "expected the number of a contribution, 1 or more, received 0"


def test_an_invalid_contribution_is_malformed_and_says_where() -> None:
    """Its error names the layer and the step: validation is part of the connection, not of the core."""
    (event,) = [_End().read(_request(_UNSET._replace(attempt=0), {"": np.zeros((6, 1), np.int64)})[0])]
    assert isinstance(event, Malformed)
    assert event.call == _UNSET._replace(attempt=0)
    assert "expected int64 limbs of shape (10, 256) for the sums of layer 'ü' (backward, step 1)" in event.text


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([pb.ExchangeRequest(part=pb.Part())], "expected no part here, received part"),
        (
            [pb.ExchangeRequest(push=pb.Push(payload=pb.Payload(size=9))), pb.ExchangeRequest(leave=pb.Leave())],
            "expected a part here, received leave",
        ),
        (
            [
                pb.ExchangeRequest(push=pb.Push(payload=pb.Payload(size=1))),
                pb.ExchangeRequest(part=pb.Part(data=bytes(2))),
            ],
            "expected a payload of 1 bytes, received 2",
        ),
    ],
)
def test_messages_that_make_no_request_are_refused(messages: list[pb.ExchangeRequest], text: str) -> None:
    """By the channel on which they arrive: each has its own parts."""
    *before, last = messages
    end = _End()
    assert [end.read(message) for message in before] == [None] * len(before)
    with pytest.raises(WireError, match=text):
        end.read(last)


def test_a_stream_begins_with_a_join() -> None:
    """Nothing else is understood before it."""
    event = _End(joined=False).read(pb.ExchangeRequest(leave=pb.Leave()))
    assert event == Malformed(7, "expected one join, as the first request of a stream")


def test_a_token_is_refused() -> None:
    """Nothing checks it, and a rank that sends one believes otherwise."""
    event = _End(joined=False).read(pb.ExchangeRequest(join=pb.Join(job="j", world_size=1, token="s3cret")))
    assert event == Malformed(7, "expected no token, which this version of the service would not check, received one")


def test_a_rank_that_comes_back_says_what_it_knows() -> None:
    """Every field of a join has its place in the event."""
    resume = pb.Resume(generation=3, sequence=8, layer_sequence=7, versions={"a": 5})
    join = pb.Join(
        job="j",
        rank=1,
        world_size=2,
        host="h",
        pid=4,
        join_timeout_ms=500,
        timeout_ms=250,
        incarnation=6,
        resume=resume,
    )
    assert _End(joined=False).read(pb.ExchangeRequest(join=join)) == Join(
        7, "j", Peer(1, "h", 4), 2, 0.5, 0.25, 6, Resume(3, 8, 7, {"a": 5})
    )
