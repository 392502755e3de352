"""What jobs that are over cost the service: nothing, if all is well.

    python -m benchmarks.many_jobs [--jobs 20000] [--layers 4] [--channels 64] [--seconds 20] [--json FILE]

A state directory gets so many finished jobs, copies of a real one. A daemon starts on it, and is measured beside one
that has an empty directory, both with one healthy job of two ranks beside the finished ones:

  start      seconds until ranks can join
  memory     MiB that the daemon then has
  idle       percent of a core while nothing happens
  p50 … max  milliseconds of a training call of the healthy job's layer
  stop       seconds from SIGTERM to the end, with the healthy job still running
  …_cpu      what of a core that took: all that a busy machine tells
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bnlayer import BatchNormalization, CollectiveError
from bnproto.v1 import journal_pb2 as pb
from bnserver.journal_encoding import Torn, decode, encode_header, framed, frames
from bnserver.store import Store
from bnworker import World
from bnworker.transports.service import ServiceTransport

_START_LIMIT_S = 300.0
_PAUSE_S = 0.002  # between two training calls: the ranks compute, too


class Daemon:
    """A service with a state directory, as a process."""

    def __init__(self, directory: Path) -> None:
        ready = directory.with_suffix(".address")
        ready.unlink(missing_ok=True)
        began = time.perf_counter()
        command = ["-m", "bnserver", "--listen", "127.0.0.1:0", "--state-dir", str(directory)]
        self.process = subprocess.Popen(
            [sys.executable, *command, "--ready-file", str(ready), "--log-level", "error"], stdout=subprocess.DEVNULL
        )
        while not ready.exists():
            if self.process.poll() is not None or time.perf_counter() - began > _START_LIMIT_S:
                self.process.kill()
                raise RuntimeError("the service did not start")
            time.sleep(0.01)
        self.start_s, self.start_cpu_s = time.perf_counter() - began, self.cpu_s()
        self.address = ready.read_text(encoding="utf-8")

    def cpu_s(self) -> float:
        """Seconds of a core that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """What it holds in memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> tuple[float, float]:
        """End it; seconds from SIGTERM, and of a core."""
        began, used = time.perf_counter(), self.cpu_s()
        self.process.send_signal(signal.SIGTERM)
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return time.perf_counter() - began, usage.ru_utime + usage.ru_stime - used


def rank(address: str, number: int, layers: int, channels: int, seconds: float) -> None:
    """One rank of a job; prints the milliseconds of each training call. Without a time it makes one step, and ends."""
    x = np.random.default_rng(number).standard_normal((8, channels)).astype(np.float32)
    world = World(ServiceTransport(address, "healthy", number, 2, timeout=120), install=False)
    model = [BatchNormalization(synchronized=True, name=f"bn{i}", collective=world) for i in range(layers)]
    for layer in model:
        layer(x, training=True)
        layer.backward(x)
    took: list[float] = []
    end = time.perf_counter() + seconds
    try:
        while seconds:
            began = time.perf_counter()
            model[0](x, training=True)
            took.append(1e3 * (time.perf_counter() - began))
            if began < end:
                time.sleep(_PAUSE_S)
                continue
            if number == 0:
                print(json.dumps(took), flush=True)
                end = float("inf")  # what it measured is said; it goes on until the service ends
    except CollectiveError:
        return
    world.leave()


def _started(address: str, arguments: argparse.Namespace, seconds: float) -> list[subprocess.Popen[str]]:
    shape = [f"--layers={arguments.layers}", f"--channels={arguments.channels}", f"--seconds={seconds}"]
    command = [sys.executable, "-m", "benchmarks.many_jobs", f"--address={address}", *shape]
    return [subprocess.Popen([*command, f"--rank={n}"], stdout=subprocess.PIPE, text=True) for n in range(2)]


def finished_jobs(directory: Path, arguments: argparse.Namespace) -> None:
    """Fill a state directory with jobs that are over."""
    daemon = Daemon(directory)
    for each in _started(daemon.address, arguments, 0):
        assert each.wait(60) == 0
    daemon.stop()
    (original,) = directory.glob("*.job")
    bodies = []
    for frame in frames(original.read_bytes()):
        assert not isinstance(frame, Torn)
        bodies.append(frame[1])
    original.unlink()
    header = decode(bodies[0])
    assert isinstance(header, pb.Header)
    rest = b"".join(framed(number, body) for number, body in enumerate(bodies[1:], 1))
    store = Store(directory)
    for number in range(arguments.jobs):
        header.job = f"finished-{number}"
        store.path(header.job).write_bytes(framed(0, encode_header(header)) + rest)
    store.close()


def measured(directory: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """What a daemon on this directory does."""
    daemon = Daemon(directory)
    memory = daemon.memory_mib()
    time.sleep(1)  # what a start leaves to do is not idling
    before = daemon.cpu_s()
    time.sleep(arguments.seconds)
    idle = 100 * (daemon.cpu_s() - before) / arguments.seconds
    ranks = _started(daemon.address, arguments, arguments.seconds)
    assert ranks[0].stdout is not None
    took = np.array(json.loads(ranks[0].stdout.readline()))
    stop_s, stop_cpu_s = daemon.stop()
    for each in ranks:
        each.wait(60)
    p50, p99 = np.percentile(took, [50, 99]).tolist()
    return {
        "start_s": daemon.start_s,
        "start_cpu_s": daemon.start_cpu_s,
        "memory_mib": memory,
        "idle_percent": idle,
        "p50_ms": p50,
        "p99_ms": p99,
        "max_ms": float(took.max()),
        "stop_s": stop_s,
        "stop_cpu_s": stop_cpu_s,
    }


def main() -> None:
    """Measure both daemons, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank(arguments.address, arguments.rank, arguments.layers, arguments.channels, arguments.seconds)
        return
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        empty, full = Path(folder, "empty"), Path(folder, "full")
        empty.mkdir()
        full.mkdir()
        began = time.perf_counter()
        finished_jobs(full, arguments)
        print(f"{arguments.jobs} finished jobs were made in {time.perf_counter() - began:.1f} s", flush=True)
        for name, directory in (("none", empty), (str(arguments.jobs), full)):
            results[name] = measured(directory, arguments)
            shown = "  ".join(f"{key} {value:.2f}" for key, value in results[name].items())
            print(f"finished jobs {name:>6}:  {shown}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
