"""How much one service carries: many ranks, many wide layers, for a while or for many exchanges.

    python -m benchmarks.load                                                    64 ranks, 100 layers of 2,048 channels
    python -m benchmarks.load --ranks 2 --layers 1 --channels 64 --exchanges 1000000

Ranks are threads of a few processes on this machine, and use its cores beside the service. Each makes training calls of
8 rows, one layer after the other. Figures, of all calls after the first round:

  calls/s       training calls of the job, each an exchange of all ranks
  p50 … max     milliseconds of one, as rank 0 sees it
  service cpu   milliseconds of a core per exchange
  memory        MiB of the service: when all layers are enrolled, and then ten times, evenly over the calls
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.many_jobs import Daemon
from bnlayer import BatchNormalization
from bnworker import World
from bnworker.transports.service import ServiceTransport

_ROWS = 8
_LOOKS = 10
_JOINING_S = 600.0


def _rank(address: str, number: int, given: argparse.Namespace) -> None:
    """One rank; rank 0 prints a line when it has enrolled, at each tenth of its calls, and at the end its times."""
    world = World(ServiceTransport(address, "load", number, given.ranks, timeout=_JOINING_S), install=False)
    x = np.random.default_rng(number).standard_normal((_ROWS, given.channels)).astype(np.float32)
    layers = [BatchNormalization(synchronized=True, name=f"bn{i}", collective=world) for i in range(given.layers)]
    for layer in layers:
        layer(x, training=True)
    world.barrier()
    took = np.empty(given.exchanges if number == 0 else 0, np.float32)
    for done in range(given.exchanges):
        if number == 0 and done * _LOOKS % given.exchanges < _LOOKS:
            print("look", flush=True)
        began = time.perf_counter()
        layers[done % given.layers](x, training=True)
        if number == 0:
            took[done] = 1e3 * (time.perf_counter() - began)
    if number == 0:
        print(json.dumps([*np.percentile(took, [50, 99, 100]).tolist(), float(took.sum()) / 1e3]), flush=True)
    world.leave()


def ranks(address: str, first: int, given: argparse.Namespace) -> None:
    """Every so many-th rank, as threads of this process."""
    threads = [
        threading.Thread(target=_rank, args=(address, number, given))
        for number in range(first, given.ranks, given.processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(given: argparse.Namespace) -> dict[str, float | list[float]]:
    """Start the service and the ranks; the figures."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "state")
        directory.mkdir()
        daemon = Daemon(directory)
        shape = [
            f"--{name}={getattr(given, name)}" for name in ("ranks", "layers", "channels", "exchanges", "processes")
        ]
        command = [sys.executable, "-m", "benchmarks.load", f"--address={daemon.address}", *shape]
        processes = [
            subprocess.Popen([*command, f"--first={n}"], stdout=subprocess.PIPE, text=True)
            for n in range(given.processes)
        ]
        output = processes[0].stdout
        assert output is not None
        memory: list[float] = []
        cpu = began = 0.0
        while (line := output.readline().strip()) == "look":
            memory.append(daemon.memory_mib())
            if not began:
                cpu, began = daemon.cpu_s(), time.perf_counter()
        p50, p99, most, seconds = json.loads(line)
        used = daemon.cpu_s() - cpu
        memory.append(daemon.memory_mib())
        for process in processes:
            assert process.wait(_JOINING_S) == 0
        daemon.stop()
    return {
        "calls/s": given.exchanges / seconds,
        "p50, ms": p50,
        "p99, ms": p99,
        "max, ms": most,
        "service cpu, ms": 1e3 * used / given.exchanges,
        "memory, MiB": [round(each, 1) for each in memory],
    }


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--exchanges", type=int, default=1000, help="training calls; %(default)s if not given")
    parser.add_argument("--processes", type=int, default=2, help="of the ranks; %(default)s if not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.address is not None:
        ranks(given.address, given.first, given)
        return
    figures = measure(given)
    for name, value in figures.items():
        print(f"{name:>16}  {value if isinstance(value, list) else f'{value:.2f}'}")
    if given.json is not None:
        given.json.write_text(json.dumps(vars(given) | figures, indent=2, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
