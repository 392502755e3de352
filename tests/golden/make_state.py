"""Makes a state directory and the messages of its jobs with this version's service, and says what they hold.

.venv/bin/python tests/golden/make_state.py tests/golden/state/NAME

Run it when a format gains something, into a new folder, and keep the folders before it: `test_upgrades.py` reads them
all. Three jobs are left behind as `kill -9` leaves them: one is over, one failed, and one is in the middle of a run, so
that its file is a snapshot with a journal after it.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from bnlayer import BatchNormalization
from bnlayer.state import LayerState
from bnproto.arrays import unpack
from bnproto.v1 import statistics_pb2 as pb
from bnserver.core.members import LivenessTimeouts
from bnserver.core.recovery import recovered
from bnserver.job_file import loaded
from bnserver.rank_channel import RequestAssembler
from bnserver.translation import Reader
from bnworker import World
from bnworker.transports.service import ServiceTransport

_X = np.linspace(-3, 5, 48, dtype=np.float32).reshape(8, 6)

# The daemon, under the name of another machine, and with every request and answer written to two files.
_DAEMON = """
import sys
from bnserver import connection, grpc_channel, job_file
from bnserver.__main__ import main

job_file._machine = lambda: "00000000-0000-4000-8000-000000000000"
requests, answers = (open(path, "ab", buffering=0) for path in sys.argv[1:3])

def noted(file, message):
    data = message.SerializeToString()
    file.write(len(data).to_bytes(4, "little") + data)

receive, send = connection.Connection.receive, grpc_channel.GrpcChannel.send

def receiving(self, request, data):
    noted(requests, request)
    receive(self, request, data)

def sending(self, messages):
    messages = list(messages)
    for message in messages:
        noted(answers, message.message)
    send(self, messages)

connection.Connection.receive, grpc_channel.GrpcChannel.send = receiving, sending
sys.argv[1:] = ["--listen", "127.0.0.1:0", "--log-level", "error", "--state-dir", sys.argv[3]]
sys.exit(main())
"""


def main(folder: Path) -> None:
    """Write the folder."""
    folder.mkdir(parents=True)
    socket.gethostname = lambda: "host"
    traffic = {name: folder / f"{name}.bin" for name in ("requests", "answers")}
    command = [sys.executable, "-c", _DAEMON, *map(str, traffic.values()), str(folder / "jobs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        address = service.stdout.readline().rpartition(" ")[2].strip()
        _run(address, "over", _train)
        _run(address, "failed", _fail)
        _run(address, "running", _train)
        _run(address, "running", _train_and_stay)
        service.kill()
    (folder / "jobs" / "lock").unlink()
    requests = [*_distinct(traffic["requests"].read_bytes(), pb.ExchangeRequest), _resuming(), _set_by_hand()]
    answers = list(_distinct(traffic["answers"].read_bytes(), pb.ExchangeResponse))
    for name, kept in (("requests", requests), ("answers", answers)):
        traffic[name].write_bytes(b"".join(len(each).to_bytes(4, "little") + each for each in kept))
    contents = {"jobs": jobs_in(folder / "jobs"), "events": events_of(requests), "answers": answers_of(answers)}
    (folder / "contents.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


# ---- what a test reads, too ----


def messages(data: bytes, kind: Any) -> Iterator[bytes]:
    """The messages of a file, each after its length; each is one of its kind."""
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        kind.FromString(data[4:end])
        yield data[4:end]
        data = data[end:]


def jobs_in(directory: Path) -> dict[str, Any]:
    """What a state directory holds."""
    jobs = {}
    for path in sorted(directory.glob("*.job")):
        name, records, _ = loaded(path)
        job = recovered(name, records, LivenessTimeouts(), 0.0)
        jobs[name] = {
            "file": path.name,
            "generation": job.number,
            "running": [generation.number for generation in job.generations],
            "ended": plain(job.ended),
            "records": [type(record).__name__ for record in records],
            "layers": {layer: plain(state) for layer, state in job.layers.states.items()},
        }
    return jobs


def events_of(requests: list[bytes]) -> list[Any]:
    """What the service understands of requests, each on a connection whose rank has joined."""
    return [plain(event_of(request)) for request in requests]


def answers_of(answers: list[bytes]) -> list[Any]:
    """What a rank reads of answers: their kind, their terms, their arrays."""
    read = []
    for data in answers:
        response = pb.ExchangeResponse.FromString(data)
        kind = response.WhichOneof("message") or ""
        message = getattr(response, kind)
        fields = {
            field.name: getattr(message, field.name)
            for field in message.DESCRIPTOR.fields
            if field.name not in ("payload", "local_socket")
        }
        arrays = unpack(message.payload, message.payload.data) if hasattr(message, "payload") else []
        read.append({"kind": kind, "generation": response.generation, **fields, "arrays": plain(arrays)})
    return read


def event_of(data: bytes) -> Any:
    """What the service understands of one request."""
    request = pb.ExchangeRequest.FromString(data)
    assembled = RequestAssembler().add(request)
    assert assembled is not None
    reader = Reader(1)
    if not request.HasField("join"):
        join = pb.Join(job="j", world_size=2, join_timeout_ms=1, timeout_ms=1)
        reader.read(pb.ExchangeRequest(join=join), b"")
    return reader.read(*assembled)


def plain(value: Any) -> Any:
    """A value as JSON, with every bit."""
    if isinstance(value, LayerState):
        return {"dtype": value.forward.dtype, **{name: plain(array) for name, array in value.arrays().items()}}
    if isinstance(value, np.ndarray):
        return [value.dtype.name, list(value.shape), value.tobytes().hex()]
    if isinstance(value, Enum):
        return str(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        return {"is": type(value).__name__} | {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


# ---- the jobs ----


def _run(address: str, job: str, body: Callable[[World], None]) -> None:
    def rank(number: int) -> None:
        transport = ServiceTransport(address, job, number, 2, timeout=60.0, local_socket=False)
        body(World(transport, install=False))

    with ThreadPoolExecutor(2) as ranks:
        for done in [ranks.submit(rank, number) for number in range(2)]:
            done.result()


def _train(world: World) -> None:
    _train_and_stay(world)
    world.leave()


def _train_and_stay(world: World) -> None:
    layers = [
        BatchNormalization(synchronized=True, name="plain", collective=world),
        BatchNormalization(synchronized=True, name="ü/renorm", renorm=True, collective=world),
        BatchNormalization(synchronized=True, name="double", dtype="float64", collective=world),
        BatchNormalization(synchronized=True, name="half", dtype="bfloat16", collective=world),
    ]
    for step in range(2):
        for layer in layers:
            x = (_X * (step + 1) + world.rank).astype(layer.compute_dtype)
            y, pullback = layer.vjp(x, training=True)
            pullback(np.ones_like(y))
    world.allreduce([np.ones(3, np.float32)])
    world.broadcast([np.arange(4)] if world.rank == 0 else None)
    world.barrier()
    world.pull("plain")
    if world.rank == 0:
        world.push(layers[0])
    world.barrier()


def _fail(world: World) -> None:
    layer = BatchNormalization(synchronized=True, name="a", collective=world)
    layer(_X + world.rank, training=True)
    world._depart("failed on purpose")


# ---- messages that no run sends for sure ----


def _resuming() -> bytes:
    resume = pb.Resume(generation=3, sequence=9, layer_sequence=7, versions={"a": 4})
    join = pb.Join(job="j", rank=1, world_size=2, host="host", pid=7, join_timeout_ms=9, timeout_ms=8, incarnation=5)
    join.resume.CopyFrom(resume)
    return pb.ExchangeRequest(join=join).SerializeToString()


def _set_by_hand() -> bytes:
    from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation
    from bnlayer.renorm import Renorm
    from bnproto.arrays import pack
    from bnproto.calls import contribution_of, with_state

    layer = BatchNormalization(name="a", renorm=True)
    layer.build((None, 3))
    signature = LayerSignature(3, "float32", 0.9, 0.001, renorm=Renorm(0.8, rmax=3.0), state=layer.state.fingerprint)
    arrays = with_state(np.arange(6).reshape(2, 3), layer.state)
    payload, _ = pack(arrays.values(), tuple(arrays))
    call = Call(Operation.PROBE, ExchangeKey("a", Direction.FORWARD, 4), signature)
    return pb.ExchangeRequest(contribution=contribution_of(call, payload, 6, 2)).SerializeToString()


def _distinct(data: bytes, kind: Any) -> Iterator[bytes]:
    """The first message of each sort."""
    seen = set()
    for each in messages(data, kind):
        message = kind.FromString(each)
        name = message.WhichOneof("message")
        inner = getattr(message, name)
        arrays = [array.dtype + array.name for array in inner.payload.arrays] if hasattr(inner, "payload") else []
        sort = (name, *(str(getattr(inner, term, "")) for term in ("operation", "direction", "known")), *arrays)
        if sort not in seen:
            seen.add(sort)
            yield each


if __name__ == "__main__":
    main(Path(sys.argv[1]))
