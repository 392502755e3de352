"""The functions that one forward exchange passes through, counted in a trace: `python -m benchmarks.hops`.

A layer makes training calls on two ranks, each a thread of its own, over a service in another process. In both
processes `sys.setprofile` records every function of this project that is entered. A path begins in `World.exchange`,
and ends where the layer goes on with the total; at the service it is everything between the first rank's call and the
last rank's answer. Of several exchanges the shortest one is taken: in the others a tick or a heartbeat came between.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from bnlayer import BatchNormalization
from bnserver.__main__ import main as serve
from bnworker import World
from bnworker.transports import Transport
from bnworker.transports.alone import AloneTransport
from bnworker.transports.service import ServiceTransport

_PACKAGES = ("bnlayer", "bnproto", "bnserver", "bnworker")
_EXCHANGES = 12
_PAUSE_S = 0.12  # between two exchanges: longer than whatever the one before leaves to be done

Hop = tuple[float, int, str]


class Trace:
    """Records which function was entered when, and by which thread."""

    def __init__(self) -> None:
        self.hops: list[Hop] = []
        self._names: dict[Any, str] = {}

    def start(self) -> None:
        """Record this thread, and those that it starts."""
        threading.setprofile(self.note)
        sys.setprofile(self.note)

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        """What `sys.setprofile` calls."""
        del argument
        if event != "call":
            return
        code = frame.f_code
        if code not in self._names:
            path = Path(code.co_filename)
            anonymous = code.co_name.startswith("<") and code.co_name != "<lambda>"
            ours = not {*_PACKAGES}.isdisjoint(path.parts) and "benchmarks" not in path.parts and not anonymous
            ours = ours and not path.stem.endswith(("_pb2", "_pb2_grpc"))
            self._names[code] = getattr(code, "co_qualname", code.co_name) if ours else ""
        if self._names[code]:
            self.hops.append((time.monotonic(), threading.get_ident(), self._names[code]))


def served(path: str) -> int:
    """Serve until SIGTERM, and write the trace to a file."""
    trace = Trace()
    trace.start()
    try:
        sys.argv = ["bnserver", "--log-level", "error", "--listen", "127.0.0.1:0"]
        return serve()
    finally:
        sys.setprofile(None)
        Path(path).write_text(json.dumps(trace.hops), encoding="utf-8")


def played(transports: list[Any]) -> tuple[list[Hop], list[tuple[float, float]], int]:
    """Train on some ranks; returns the trace, when the exchanges were, and the thread of rank 0."""
    trace, barrier = Trace(), threading.Barrier(len(transports))
    calls: dict[int, list[tuple[float, float]]] = {}
    threads: dict[int, int] = {}

    def rank(number: int) -> None:
        transport: Transport = transports[number]()
        threads[number], calls[number] = threading.get_ident(), []
        with World(transport, install=False) as world:
            layer = BatchNormalization(synchronized=True, name="a", collective=world)
            x = np.random.default_rng(number).normal(size=(8, 64)).astype(np.float32)
            for _ in range(3):  # the first ones enroll and probe
                layer(x, training=True)
            for _ in range(_EXCHANGES):
                barrier.wait()
                time.sleep(_PAUSE_S)
                start = time.monotonic()
                layer(x, training=True)
                calls[number].append((start, time.monotonic()))

    trace.start()
    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(len(transports))]
    sys.setprofile(None)
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    threading.setprofile(None)
    spans = [(min(s for s, _ in each), max(e for _, e in each)) for each in zip(*calls.values(), strict=True)]
    return trace.hops, spans, threads[0]


def between(hops: list[Hop], start: float, end: float, threads: set[int] | None = None) -> list[str]:
    """The functions that were entered in some time."""
    return [name for when, thread, name in hops if start <= when <= end and (threads is None or thread in threads)]


def exchange_of(names: list[str]) -> list[str]:
    """Of a training call's functions, those of its exchange."""
    begin = names.index("World.exchange")
    return names[begin : next(n for n in range(begin, len(names)) if names[n] == "ForwardExchange.reduced")]


def shown(title: str, paths: list[list[str]]) -> None:
    """The shortest path, and how long it is."""
    path = min(paths, key=len)
    print(f"{title}: {len(path)}\n  {' → '.join(path)}\n")


def measured(*, local: bool) -> None:
    """One exchange over the service."""
    way = "local socket" if local else "gRPC"
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/trace"
        command = [sys.executable, "-m", "benchmarks.hops", path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as daemon:
            assert daemon.stdout is not None
            address = daemon.stdout.readline().split()[-1]
            join = [
                lambda rank=rank: ServiceTransport(address, "hops", rank, 2, local_socket=local) for rank in range(2)
            ]
            hops, calls, thread = played(join)
            daemon.send_signal(signal.SIGTERM)
        service = json.loads(Path(path).read_text(encoding="utf-8"))
    ranks = {thread for _, thread, name in hops if name == "World.exchange"}
    others = {thread for _, thread, _ in hops} - ranks
    shown(f"{way}: rank", [exchange_of(between(hops, *call, {thread})) for call in calls])
    shown(f"{way}: other threads of both ranks", [between(hops, *call, others) for call in calls])
    shown(f"{way}: service, for both ranks", [between(service, start, end + _PAUSE_S / 6) for start, end in calls])


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(served(sys.argv[1]))
    hops, calls, thread = played([AloneTransport])
    shown("alone", [exchange_of(between(hops, *call, {thread})) for call in calls])
    for local in (False, True):
        measured(local=local)
