"""What others on the same service cost a job, beside what they cost it on another service of the same machine.

    python -m benchmarks.beside [--rounds 3] [--calls 1500] [--json FILE]

A healthy job of two ranks makes training calls, each after a pause of 2 ms. Beside it, in turns, on its own service and
on a second one that has nothing to do with it, so that both times the machine is equally busy:

  another job     two ranks that reduce 4 MiB without a pause, as fast as the service answers
  strangers       a process that connects to the service's local socket and closes, as fast as it can
  mute            1,000 connections to its port that say nothing

Figures: milliseconds of a training call, the median over the rounds, on both, and their ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.many_jobs import Daemon
from bnlayer import BatchNormalization
from bnworker import World
from bnworker.transports.service import ServiceTransport

_CHANNELS, _ROWS = 64, 8
_PAUSE_S = 0.002  # between two calls: the ranks compute, too
_LARGE = 2**19  # float64 numbers that the other job reduces at once
_MUTE = 1000
_WARM = 100  # calls that are not counted
_WAYS = ("nothing", "another job", "strangers", "mute")


def healthy(address: str, job: str, rank: int, calls: int) -> None:
    """One rank of the job that is measured; rank 0 prints the milliseconds of its calls."""
    x = np.random.default_rng(rank).standard_normal((_ROWS, _CHANNELS)).astype(np.float32)
    with World(ServiceTransport(address, job, rank, 2, timeout=120), install=False) as world:
        layer = BatchNormalization(synchronized=True, name="bn", collective=world)
        took: list[float] = []
        for _ in range(_WARM + calls):
            began = time.perf_counter()
            layer(x, training=True)
            took.append(1e3 * (time.perf_counter() - began))
            time.sleep(_PAUSE_S)
    if rank == 0:
        print(json.dumps(took[_WARM:]), flush=True)


def another_job(address: str, job: str, rank: int) -> None:
    """One rank of a job that takes all it gets."""
    large = np.ones(_LARGE)
    with World(ServiceTransport(address, job, rank, 2, timeout=120), install=False) as world:
        print("ready", flush=True)
        while True:
            world.allreduce([large])


def strangers(address: str) -> None:
    """Connect to a local socket, and close, again and again."""
    print("ready", flush=True)
    while True:
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.settimeout(2)
            connection.connect("\0" + address)


def mute(address: str) -> None:
    """Hold connections that say nothing; those that the service closes are opened anew."""
    host, _, port = address.rpartition(":")
    held: list[socket.socket] = []
    while len(held) < _MUTE:
        held.append(socket.create_connection((host, int(port)), timeout=5))
    print("ready", flush=True)
    while True:
        time.sleep(0.1)  # the service closes the mute after seconds
        for index, each in enumerate(held):
            each.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                try:
                    closed = not each.recv(4096)
                except ConnectionError:
                    closed = True
                if closed:
                    each.close()
                    held[index] = socket.create_connection((host, int(port)), timeout=5)


def _local_socket(daemon: Daemon) -> str:
    """The name of a service's abstract socket."""
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    own = {str(each.readlink()) for each in folder.iterdir()}
    for line in Path("/proc/net/unix").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if fields[-1].startswith("@bnserver-") and f"socket:[{fields[6]}]" in own:
            return fields[-1][1:]
    raise RuntimeError("the service has no local socket")


def _process(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.beside", "--as", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@contextlib.contextmanager
def _disturbed(way: str, daemon: Daemon, name: str) -> Iterator[None]:
    by_way: dict[str, list[tuple[str, ...]]] = {
        "nothing": [],
        "another job": [("another_job", daemon.address, name, str(rank)) for rank in range(2)],
        "strangers": [("strangers", _local_socket(daemon))],
        "mute": [("mute", daemon.address)],
    }
    processes = [_process(*arguments) for arguments in by_way[way]]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def measured(daemon: Daemon, job: str, calls: int) -> list[float]:
    """The milliseconds of each call."""
    ranks = [_process("healthy", daemon.address, job, str(rank), str(calls)) for rank in range(2)]
    output, _ = ranks[0].communicate()
    ranks[1].communicate()
    assert [each.returncode for each in ranks] == [0, 0]
    took: list[float] = json.loads(output)
    return took


def measure(rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """All figures, by what is beside the job and where."""
    every: dict[tuple[str, str], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        daemons: dict[str, Daemon] = {}
        for where in ("same", "other"):
            directory = Path(folder, where)
            directory.mkdir()
            daemons[where] = Daemon(directory)
        for number in range(rounds):
            for way in _WAYS:
                for where, daemon in daemons.items():
                    with _disturbed(way, daemon, f"other-{number}"):
                        took = measured(daemons["same"], f"healthy-{way}-{where}-{number}", calls)
                    every.setdefault((way, where), []).append([*np.percentile(took, [50, 99]).tolist(), max(took)])
        for daemon in daemons.values():
            daemon.stop()
    figures: dict[str, dict[str, float]] = {}
    for (way, where), summaries in every.items():
        medians = [statistics.median(column) for column in zip(*summaries, strict=True)]
        figures[f"{way}, {where}"] = dict(zip(("p50", "p99", "max"), medians, strict=True))
    return figures


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s if not given")
    parser.add_argument("--calls", type=int, default=1500, help="training calls a round; %(default)s if not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as", dest="role", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    match given.role:
        case ["healthy", address, job, rank, calls]:
            healthy(address, job, int(rank), int(calls))
        case ["another_job", address, job, rank]:
            another_job(address, job, int(rank))
        case ["strangers", address]:
            strangers(address)
        case ["mute", address]:
            mute(address)
        case _:
            figures = measure(given.rounds, given.calls)
            print("| beside it | figure | on another service, ms | on the same, ms | ratio |\n|---|---|--:|--:|--:|")
            for way in _WAYS:
                same, other = figures[f"{way}, same"], figures[f"{way}, other"]
                for name, value in same.items():
                    print(f"| {way} | {name} | {other[name]:.2f} | {value:.2f} | {value / other[name]:.2f} |")
            if given.json is not None:
                given.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
