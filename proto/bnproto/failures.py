"""Failures as the end of a stream: a gRPC status whose details say whom it blames, and where.

The status message may be cut on its way, the details are whole. A status without our details comes from gRPC
itself, or from something that is no statistics service.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from bnlayer.errors import (
    CollectiveError,
    JobFinishedError,
    MismatchError,
    PeerLostError,
    RegroupError,
    ServiceError,
    StallError,
)
from bnproto.grpc_options import SERVICE_NAME
from bnproto.v1 import statistics_pb2 as pb

# reason: what a rank raises, and the status that proxies in between understand.
_MEANING: dict[pb.ErrorReason.ValueType, tuple[type[CollectiveError], grpc.StatusCode]] = {
    pb.ERROR_REASON_MISMATCH: (MismatchError, grpc.StatusCode.FAILED_PRECONDITION),
    pb.ERROR_REASON_STALL: (StallError, grpc.StatusCode.ABORTED),
    pb.ERROR_REASON_PEER_LOST: (PeerLostError, grpc.StatusCode.ABORTED),
    pb.ERROR_REASON_DEADLINE: (PeerLostError, grpc.StatusCode.DEADLINE_EXCEEDED),
    pb.ERROR_REASON_INVALID: (ServiceError, grpc.StatusCode.INVALID_ARGUMENT),
    pb.ERROR_REASON_STOPPING: (ServiceError, grpc.StatusCode.UNAVAILABLE),
    pb.ERROR_REASON_INTERNAL: (ServiceError, grpc.StatusCode.INTERNAL),
    pb.ERROR_REASON_STALE_GENERATION: (ServiceError, grpc.StatusCode.FAILED_PRECONDITION),
    pb.ERROR_REASON_QUOTA: (ServiceError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    pb.ERROR_REASON_UNAUTHENTICATED: (ServiceError, grpc.StatusCode.UNAUTHENTICATED),
    pb.ERROR_REASON_PERMISSION: (ServiceError, grpc.StatusCode.PERMISSION_DENIED),
    pb.ERROR_REASON_DATA_LOSS: (ServiceError, grpc.StatusCode.DATA_LOSS),
    pb.ERROR_REASON_REGROUP: (RegroupError, grpc.StatusCode.ABORTED),
    pb.ERROR_REASON_FINISHED: (JobFinishedError, grpc.StatusCode.FAILED_PRECONDITION),
}
_RETRY_AFTER_S = {pb.ERROR_REASON_STOPPING: 1, pb.ERROR_REASON_QUOTA: 5}
_MESSAGE_CHARACTERS = 500  # of the status message, which proxies and logs copy about

DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class StatusParts:
    """What ends a stream.

    Attributes:
        code: gRPC's.
        message: the text, cut.
        details: a serialized `google.rpc.Status` for the trailing metadata, under `DETAILS_KEY`.
    """

    code: grpc.StatusCode
    message: str
    details: bytes


def status_of(failure: pb.Failure) -> StatusParts:
    """The status that carries a failure to a rank."""
    _, code = _MEANING[failure.reason]
    reason = pb.ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")
    message = failure.text[:_MESSAGE_CHARACTERS]
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.append(_any(error_details_pb2.ErrorInfo(reason=reason, domain=SERVICE_NAME)))
    status.details.append(_any(failure))
    retry_after = _RETRY_AFTER_S.get(failure.reason)
    if retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.seconds = retry_after
        status.details.append(_any(retry))
    return StatusParts(code, message, status.SerializeToString())


def failure_in(details: bytes) -> pb.Failure | None:
    """The failure in a status's details; None if it holds none."""
    failure = pb.Failure()
    for detail in status_pb2.Status.FromString(details).details:
        if detail.Unpack(failure):
            return failure
    return None


def error_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> CollectiveError | None:
    """What the trailing metadata of a call say that it failed of; None where the service did not say."""
    for key, value in metadata or ():
        failure = failure_in(value) if key == DETAILS_KEY and isinstance(value, bytes) else None
        if failure is not None:
            return error_of(failure)
    return None


def error_of(failure: pb.Failure) -> CollectiveError:
    """What a rank raises for a failure."""
    kind, _ = _MEANING.get(failure.reason, (ServiceError, None))
    return kind(
        failure.text,
        ranks=tuple(failure.ranks),
        layer=failure.layer if failure.HasField("layer") else None,
        step=failure.step if failure.HasField("step") else None,
    )


def _any(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo | pb.Failure) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
