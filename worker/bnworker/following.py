"""`follow`: the moving statistics of a job, for a process that takes no part in it.

The service is asked again and again for what has changed, and answers with what is true then: whoever is slow between
two values misses those that came meanwhile, and nobody waits for them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from numpy.typing import NDArray

from bnlayer.environment import variable
from bnlayer.errors import CollectiveError, ServiceError
from bnproto.address import hint, split
from bnproto.arrays import PayloadAssembler, WireError, named
from bnproto.connection import Connector
from bnproto.credentials import credentials
from bnproto.failures import error_in
from bnproto.v1 import observation_pb2 as pb
from bnproto.v1 import observation_pb2_grpc as rpc

_WAIT_S = 5.0  # for a change, at the service; then it is asked anew, so that one that is gone is noticed
_ANSWER_S = 60.0  # after that, for all layers
_RETRY_S = 0.5  # between two attempts to reach it
_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True, slots=True, eq=False)
class MovingStatistics:
    """The moving statistics of one layer, as their owner has them.

    Attributes:
        job: the job's name.
        layer: the layer's.
        version: of its statistics; goes back where the ranks set earlier ones.
        mean, variance: each (C,), in the dtype of the layer's variables.
    """

    job: str
    layer: str
    version: int
    mean: NDArray[Any]
    variance: NDArray[Any]


def follow(
    job: str | None = None,
    address: str | None = None,
    *,
    token: str | None = None,
    layers: Iterable[str] = (),
    interval: float = 0.5,
    forever: bool = False,
    timeout: float = 300,
) -> Iterator[MovingStatistics]:
    """The moving statistics of a job: first as they are, then those of each layer that has changed.

    For evaluators and inference servers. The process is no rank, and no rank notices it. It needs a token of the role
    `reader`, where the service asks for tokens. Values that a slow consumer misses are left out: what comes next is
    always the latest. Layers that have changed come one after the other, as they were at one moment.

    Args:
        job: its name; None: `BNLAYER_JOB`.
        address: of the service, "HOST:PORT"; None: `BNLAYER_ADDRESS`. Certificates and tokens are found as by `join`.
        token: as in `join`.
        layers: names of those that are wanted; none: all.
        interval: seconds that lie between two questions, at least.
        forever: go on when the job is over, and wait for one that is not there yet. Otherwise the values end when the
            job is over, after its last ones.
        timeout: seconds for which a service that does not answer is tried again.

    Yields:
        One layer's statistics.

    Raises:
        ValueError: an argument is missing or wrong, or credentials can't be read.
        ServiceError: the service refuses, knows no such job, or stays away.
    """
    address = address or variable(os.environ, "BNLAYER_ADDRESS")
    job = job or variable(os.environ, "BNLAYER_JOB")
    if not address or not job:
        missing = "address= (or BNLAYER_ADDRESS) of a service" if not address else "job= (or BNLAYER_JOB)"
        raise ValueError(f"follow: missing {missing}.")
    if split(address) is None:
        raise ValueError(
            f"follow(address=): expected HOST:PORT, such as 127.0.0.1:50051, received {address!r}.{hint(address)}"
        )
    for name, seconds, least in (("interval", interval, 0.0), ("timeout", timeout, 0.0)):
        if isinstance(seconds, bool) or not least <= seconds < math.inf:
            raise ValueError(f"follow({name}=): expected a number of seconds, 0 or more, received {seconds!r}.")
    if isinstance(layers, str):
        raise ValueError(f"follow(layers=): expected a list of names, received {layers!r}; write [{layers!r}].")
    connector = Connector(address, credentials(os.environ, token))
    return _followed(_Reader(connector, job, tuple(layers), forever), float(interval), float(timeout))


def _followed(reader: _Reader, interval: float, timeout: float) -> Iterator[MovingStatistics]:
    reached = time.monotonic()
    try:
        while True:
            began = time.monotonic()
            try:
                changed = reader.ask()
            except _AwayError as error:
                if time.monotonic() >= reached + timeout:
                    raise ServiceError(f"{error} No answer for {timeout:g} s.") from error
                time.sleep(_RETRY_S)
                continue
            reached = time.monotonic()
            yield from changed
            if reader.is_over:
                return
            time.sleep(max(began + interval - time.monotonic(), 0.0))
    finally:
        reader.close()


class _AwayError(Exception):
    """The service does not answer now."""


@dataclass(slots=True)
class _Reader:
    """Asks for what has changed since the last time.

    Attributes:
        is_over: nothing more will come.
    """

    connector: Connector
    job: str
    layers: tuple[str, ...]
    forever: bool
    is_over: bool = False
    _seen: dict[str, bytes] = field(default_factory=dict)
    _channel: grpc.Channel | None = None

    def ask(self) -> list[MovingStatistics]:
        """The layers whose statistics have changed; none, if none has for a while.

        Raises:
            ServiceError: the service refuses, or knows no such job.
            _AwayError: it does not answer.
        """
        self._channel = self._channel or self.connector.channel()
        request = pb.ReadStatisticsRequest(
            job=self.job, layers=self.layers, seen=self._seen, wait_ms=round(_WAIT_S * 1000), forever=self.forever
        )
        call = rpc.ObservationServiceStub(self._channel).ReadStatistics(request, timeout=_WAIT_S + _ANSWER_S)
        try:
            return self._received(call)
        except WireError as error:
            call.cancel()
            raise ServiceError(
                f"The service at {self.connector.address} answered what can't be read: {error}."
            ) from error
        except grpc.RpcError as error:
            self.close()
            raise self._explained(call) from error

    def close(self) -> None:
        """Hang up."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _received(self, call: Iterable[pb.ReadStatisticsResponse]) -> list[MovingStatistics]:
        changed: list[MovingStatistics] = []
        stamps: dict[str, bytes] = {}
        statistics, assembler = pb.LayerStatistics(), PayloadAssembler(pb.LayerStatistics().payload)
        for response in call:
            kind = response.WhichOneof("message")
            if kind == "job":
                self._check_job(response.job)
                self._seen |= stamps
                return changed
            if kind == "statistics":
                statistics = response.statistics
                assembler = PayloadAssembler(statistics.payload)
            elif kind == "part" and not assembler.complete:
                assembler.add(response.part)
            else:
                raise WireError(f"expected statistics, received {kind or 'nothing'}")
            if assembler.complete:
                arrays = named(statistics.payload, assembler.data)
                mean, variance = arrays["moving_mean"], arrays["moving_variance"]
                changed.append(MovingStatistics(self.job, statistics.layer, statistics.version, mean, variance))
                stamps[statistics.layer] = statistics.stamp
        raise WireError("expected what it knows of the job, received the end")

    def _check_job(self, job: pb.JobSeen) -> None:
        if self.forever:
            return
        if not job.known:
            raise ServiceError(
                f"The service at {self.connector.address} knows no job {self.job!r}. Compare the name with "
                "`bnlayer jobs`; to wait until it begins: forever=True."
            )
        self.is_over = job.over

    def _explained(self, call: Any) -> CollectiveError | _AwayError:
        """What ended a call."""
        code, text = call.code(), call.details()
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return ServiceError(
                f"What listens at {self.connector.address} shows no statistics: it is no statistics service, or one of "
                f"a release before this one; upgrade it. It says: {text}."
            )
        if code in _UNREACHABLE:
            fault = self.connector.fault()
            if fault is not None:
                return ServiceError(fault)
            return _AwayError(f"The service at {self.connector.address} does not answer: {text.rstrip('.')}.")
        error = error_in(call.trailing_metadata())
        if error is not None:
            return error
        return ServiceError(f"The service at {self.connector.address} failed: {code.name}: {text}.")
