"""One rank of a fault test, as a process that is told what to do: a line of JSON in, lines of JSON out.

python -m support.fault.worker

A line on stdin is a `Part`: join a job, train, and stop where it says. The worker answers

    {"at": "joined"}                       once all ranks are there
    {"at": "paused", "exchange": 17}       before the exchange at which it was told to pause; a line lets it go on
    {"at": "reached", "step": 30}          where it was told to train to; the next line says how far to go on, 0: leave
    {"at": "left"}                         after a goodbye
    {"at": "told", "kind": …, "when": …}   after an error, with the moment on the machine's monotonic clock

and then waits for its next part, so that a rank that outlived a round of a campaign plays in the next one too.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bnlayer import CollectiveError
from bnworker import World
from bnworker.transports.service import ServiceTransport
from support.fault.history import Recorder
from support.fault.program import layers, train_step


@dataclass(frozen=True)
class Part:
    """What one rank does in one job.

    Attributes:
        address, job, rank, world_size: where it belongs.
        seed: of its data.
        until: the step at which it stops, and asks how far to go on.
        timeout: seconds that joining, and each exchange, may take.
        log: the file that its history goes to; "": none.
        pauses: the numbers of the exchanges before which it stops.
        how: what it does there: "wait" sleeps in the kernel, "compute" keeps a core busy.
        hold_every, hold_s: each so many steps it keeps the interpreter's lock for so long; 0: never.
        large_every: each so many steps all ranks add arrays that travel in parts; 0: never.
    """

    address: str
    job: str
    rank: int
    world_size: int
    seed: int
    until: int
    timeout: float = 120.0
    log: str = ""
    pauses: tuple[int, ...] = ()
    how: Literal["wait", "compute"] = "wait"
    hold_every: int = 0
    hold_s: float = 0.0
    large_every: int = 0

    def line(self) -> str:
        """As a line for a worker's stdin."""
        return json.dumps(asdict(self))


def main() -> None:
    """Play one part after the other until stdin ends."""
    report(at="ready")
    while line := next_line():
        part = Part(**json.loads(line))
        try:
            _play(part)
        except CollectiveError as error:
            when = time.monotonic()
            kind, ranks = type(error).__name__, list(error.ranks)
            report(at="told", kind=kind, ranks=ranks, layer=error.layer, step=error.step, text=str(error), when=when)


def report(**fields: Any) -> None:
    """Answer."""
    sys.stdout.write(json.dumps({**fields, "pid": os.getpid()}) + "\n")
    sys.stdout.flush()


def next_line() -> str:
    """The next line of stdin, read byte by byte, so that `select` sees what is still to come."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return ""
        line += byte
    return line.decode()


def _play(part: Part) -> None:
    transport = ServiceTransport(part.address, part.job, part.rank, part.world_size, timeout=part.timeout)
    world = World(transport, install=False)
    report(at="joined")

    def before(exchanges: int) -> None:
        if exchanges in part.pauses:
            report(at="paused", exchange=exchanges)
            if part.how == "compute":
                _compute_until_failure()
            next_line()

    with world:
        recorder = Recorder(world, Path(part.log) if part.log else None, before)
        model = layers(recorder)
        step, until = 0, part.until
        while step < until:
            train_step(recorder, model, part.seed, step, part.large_every)
            step += 1
            if part.hold_every and step % part.hold_every == 0:
                hold_the_interpreter(part.hold_s)
            if step == until:
                report(at="reached", step=step)
                until = int(next_line() or 0)
    report(at="left")


def _compute_until_failure() -> None:
    x = np.ones((64, 64))
    while not select.select([0], [], [], 0)[0]:
        x = np.tanh(x @ x)


def hold_the_interpreter(seconds: float) -> None:
    """Sleep in a C function without giving the interpreter's lock back: no other thread of Python runs."""
    ctypes.PyDLL(None).usleep(round(seconds * 1e6))


if __name__ == "__main__":
    main()
