"""One rank of an elastic job over MPI in which something goes wrong once: mpirun --with-ft ulfm -n N … WAY.

It prints, as JSON, the generations that it saw, and the bits that it ends each with.
"""

import hashlib
import json
import os
import signal
import sys
from typing import Any

import numpy as np

import bnworker
from bnlayer import BatchNormalization
from bnlayer.collective import ADMIT, Call, PlainSignature
from bnlayer.environment import announced
from bnlayer.errors import PeerLostError
from bnworker.transports import mpi_recovery
from bnworker.transports.mpi_runtime import MPI
from bnworker.transports.mpi_wait import Wait

STEPS, COMMIT_EVERY, AT = 6, 3, 4
FIRST_RANK = announced(os.environ)[0].rank  # as the job began


def main(way: str) -> None:
    """A loop whose sums are exact, and what happens to one rank at step `AT`, or at the end."""
    norm = BatchNormalization(synchronized=True, name="bn", dtype="float64")
    norm.build((None, 3))
    state: Any = bnworker.State(layers=[norm], total=np.zeros(3, np.int64), step=0)
    most = 3 + (way == "limits" and FIRST_RANK == 1)
    for generation in bnworker.elastic(state, min=3 if way == "too-few" else 2, max=most, timeout=60.0):
        with generation as world:
            happens = generation.number == 1 and {"cut-at-the-end": 0}.get(way, 1) == FIRST_RANK
            print(json.dumps({"generation": generation.number, "ranks": world.world_size, "step": state.step}))
            while state.step < STEPS:
                rows = np.random.default_rng(state.step).integers(-99, 99, (17, 3))
                mine = rows[world.shard(len(rows))]
                norm(mine.astype(np.float64), training=True)
                if way in {"freezes", "exits"} and state.step == AT:
                    world._transport._timeout = 6.0  # type: ignore[attr-defined]  # not before: joining takes its time
                if happens and state.step == AT:
                    befalls(way, world._transport)  # type: ignore[arg-type]
                (total,) = world.allreduce([mine.sum(axis=0)])
                if happens and state.step == AT and way == "falls-behind":
                    raise world._transport._loss(None)  # type: ignore[attr-defined]
                state.total = state.total + total
                state.step += 1
                if state.step % COMMIT_EVERY:
                    state.save()
                elif state.step < STEPS:
                    state.commit()
            if happens and way == "cut-at-the-end":
                cut_off_admissions(world._transport)  # type: ignore[arg-type]
            arrays = [state.total, *norm.state.arrays().values()]
            digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
            print(json.dumps({"ends": digest}), flush=True)


def cut_off_admissions(transport: mpi_recovery.RecoverableTransport) -> None:
    """From now on, let them complete on the other ranks, and fail on this one."""
    agree = transport._agree

    def cut_off(call: Call | None, *arguments: Any, **more: Any) -> Wait:
        wait = agree(call, *arguments, **more)
        if call is not None and call.signature == PlainSignature(ADMIT):
            raise transport._loss(call)
        return wait

    transport._agree = cut_off  # type: ignore[method-assign]


def fail_unspecifically(transport: mpi_recovery.RecoverableTransport) -> None:
    """Let this rank's next request fail as Open MPI's does that was revoked between two rounds of its schedule."""

    def fail(request: MPI.Request, wait: Wait) -> None:
        raise PeerLostError("MPI failed") from MPI.Exception(MPI.ERR_OTHER)

    transport._comm.Revoke()
    transport._complete = fail  # type: ignore[method-assign]


def befalls(way: str, transport: mpi_recovery.RecoverableTransport) -> None:
    """Between the exchanges of a step: this rank fails, freezes, or is killed."""
    if way == "fails":
        raise ValueError("no such file")
    if way == "exits":
        os._exit(7)
    if way == "unspecific":
        fail_unspecifically(transport)
    if way in {"freezes", "too-few"}:
        os.kill(os.getpid(), signal.SIGSTOP if way == "freezes" else signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
