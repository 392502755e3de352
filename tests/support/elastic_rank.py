"""A rank of an elastic job whose sums are exact: what is lost or doubled anywhere shows in the bits that it ends with.

It kills itself with -9 where `BNLAYER_TEST_KILLS` says so, once each: a list of [slot, step, point], with a folder that
remembers which were done. Before each the ranks wait, letting others in, until they are as many as were started.
`BNLAYER_TEST_LOSES` says what is lost with it: see `support.elastic`.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import bnworker
from bnlayer import BatchNormalization
from support.elastic import BEFORE, BETWEEN, COMMIT_EVERY, POWER, RANK, SAVED, SUMMED, WAY

folder, steps, full = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
slot = int(os.environ.get("BNLAYER_TEST_FIRST", "0")) + int(
    os.environ.get("BNLAYER_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
)
kills = json.loads(os.environ.get("BNLAYER_TEST_KILLS", "[]"))
norm = BatchNormalization(synchronized=True, name="bn", dtype="float64", momentum=0.9)
norm.build((None, 5))
state: Any = bnworker.State(layers=[norm], total=np.zeros(5, np.int64), step=0)
comes_back = "BNLAYER_TEST_LOSES" in os.environ  # what was lost: they end together
holds = {step - (where == SAVED): number for number, (_, step, where) in enumerate(kills)}


def done(step: int) -> bool:
    """Whether the kill before which the ranks wait at this step was done."""
    return (folder / f"kill-{holds[step]}").exists()


def die_at(point: str) -> None:
    """If it is planned."""
    for number, (victim, step, where) in enumerate(kills):
        mark = folder / f"kill-{number}"
        if (victim, step, where) == (slot, state.step, point) and not mark.exists():
            lose(os.environ.get("BNLAYER_TEST_LOSES", RANK), mark)


def lose(what: str, mark: Path) -> None:
    """This process, its host, or the way there."""
    if what == POWER:
        subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    elif what == WAY:
        for rule in (
            "add table inet lost",
            *(
                f"add chain inet lost {way} {{ type filter hook {way} priority 0; policy drop; }}"
                for way in ("input", "output")
            ),
        ):
            subprocess.run(["/usr/sbin/nft", rule], check=True)
    mark.write_text(f"{time.monotonic()} {generation.number}")
    if what == WAY:
        return
    if what == POWER:
        here = Path("/proc/self/ns/net").stat().st_ino
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (folder / "ns/net").stat().st_ino == here and int(folder.name) != os.getpid():
                    os.kill(int(folder.name), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def tell(**facts: object) -> None:
    """A line for the test."""
    print(json.dumps({"slot": slot, "time": time.monotonic(), **facts}), flush=True)


for generation in bnworker.elastic(state, timeout=120):
    with generation as world:
        tell(generation=generation.number, rank=world.rank, ranks=world.world_size, step=state.step)
        begun = state.step
        while state.step < steps:
            holding = state.step in holds and not done(state.step)
            while (holding or (comes_back and state.step == steps - 1)) and world.world_size < full:
                time.sleep(0.02)
                world.admit()
            rows = np.random.default_rng(state.step).integers(-99, 99, (37, 5))
            mine = rows[world.shard(len(rows))]
            die_at(BEFORE)
            y = norm(mine.astype(np.float64), training=True)
            die_at(BETWEEN)
            norm.backward(y * mine)
            (total,) = world.allreduce([mine.sum(axis=0)])
            die_at(SUMMED)
            for weight in norm.trainable_weights:
                assert weight.gradient is not None
                weight.assign(weight.value - 1e-4 * weight.gradient)
            state.total = state.total + total
            state.step += 1
            if state.step == begun + 1:
                tell(goes_on=generation.number)
            state.save()
            die_at(SAVED)
            if state.step % COMMIT_EVERY == 0:
                state.commit()
        arrays = [state.total, *(weight.numpy() for weight in norm.weights), *norm.state.arrays().values()]
        tell(ends=hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest(), step=state.step)
