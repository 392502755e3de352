"""What one exchange costs, beside what it is made of: a raw socket, and bare gRPC.

    python benchmarks/exchange.py [--ranks 2] [--channels 256] [--blocks 20] [--exchanges 200] [--json FILE]

All ways carry the same bytes between the same number of processes, and are taken in turns, block by block, so that
whatever else the machine does meets all of them alike. A number is the median of the blocks; the spread is from the
10th to the 90th percentile.

  socket      a server in plain Python reads all ranks' words from TCP sockets, adds them, and writes the sum back
  grpc        the same over one bidirectional gRPC stream per rank, asyncio server, a message of bytes each way
  service     world.exchange over the statistics service, in memory alone
  journal     the same with --state-dir: every exchange is written before it is answered
  stream      the same as service over gRPC alone: what ranks on other machines do
  layer       a training call of a layer on 8 rows, over the service without a state directory
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation
from bnlayer.exchange import ForwardExchange
from bnlayer.kernels import kernels
from bnlayer.view import View
from bnproto.grpc_options import CLIENT_OPTIONS, SERVER_OPTIONS
from bnworker import World
from bnworker.transports.service import ServiceTransport

_ROWS = 6  # limbs per channel, float32
_METHOD = "/echo/Exchange"
_WAYS = ("socket", "grpc", "service", "stream", "journal", "layer")


# ---- the two servers to compare with ----


def added(parts: Iterable[bytes | bytearray]) -> bytes:
    """The sum of what all ranks sent."""
    total: NDArray[np.int64] = np.sum([np.frombuffer(part, np.int64) for part in parts], 0)
    return total.tobytes()


def serve_socket(ranks: int, size: int) -> None:
    """Add what all ranks send, in one thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    ends = [listener.accept()[0] for _ in range(ranks)]
    selector = selectors.DefaultSelector()
    for end in ends:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(end, selectors.EVENT_READ)
    received: dict[int, bytearray] = {end.fileno(): bytearray() for end in ends}
    while True:
        for key, _ in selector.select():
            data = key.fileobj.recv(size)  # type: ignore[union-attr]  # sockets are what was registered
            if not data:
                return
            received[key.fd] += data
        if all(len(each) == size for each in received.values()):
            total = added(received.values())
            for end in ends:
                received[end.fileno()] = bytearray()
                end.sendall(total)


def serve_grpc(ranks: int) -> None:
    """The same over gRPC."""

    class Echo(grpc.GenericRpcHandler):
        def __init__(self) -> None:
            self.parts: list[bytes] = []
            self.queues: list[asyncio.Queue[bytes]] = []

        def service(self, _: grpc.HandlerCallDetails) -> Any:
            return grpc.stream_stream_rpc_method_handler(self.exchange)

        async def exchange(self, requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
            queue: asyncio.Queue[bytes] = asyncio.Queue()
            self.queues.append(queue)
            async for request in requests:
                self.parts.append(request)
                if len(self.parts) == ranks:
                    total = added(self.parts)
                    self.parts = []
                    for each in self.queues:
                        each.put_nowait(total)
                yield await queue.get()

    async def serve() -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((Echo(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(port, flush=True)
        await server.wait_for_termination()

    asyncio.run(serve())


# ---- a rank ----


def by_socket(port: int, limbs: NDArray[np.int64]) -> Callable[[], None]:
    """One exchange over a socket."""
    end = socket.create_connection(("127.0.0.1", port))
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    size = limbs.nbytes

    def exchange() -> None:
        end.sendall(limbs.tobytes())
        received = bytearray()
        while len(received) < size:
            received += end.recv(size)
        np.frombuffer(received, np.int64)

    return exchange


def by_grpc(port: int, limbs: NDArray[np.int64]) -> Callable[[], None]:
    """One exchange over bare gRPC."""
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", CLIENT_OPTIONS)
    requests: SimpleQueue[bytes] = SimpleQueue()
    call: Any = channel.stream_stream(_METHOD)  # its types know requests with a serializer alone
    responses = call(iter(requests.get, None))

    def exchange() -> None:
        requests.put(limbs.tobytes())
        np.frombuffer(next(responses), np.int64)

    return exchange


def by_service(
    address: str, rank: int, ranks: int, limbs: NDArray[np.int64], *, local_socket: bool = True
) -> tuple[Callable[[], None], World]:
    """One exchange of a layer's sums, without the layer."""
    job = "bench" if local_socket else "bench-stream"
    world = World(ServiceTransport(address, job, rank, ranks, local_socket=local_socket), install=False)
    layer = BatchNormalization(synchronized=True, name="a", collective=world)
    x = np.random.default_rng(rank).normal(size=(8, limbs.shape[1])).astype(np.float32)
    layer(x, training=True)
    exchange = ForwardExchange.begin(layer.state.forward, layer.epsilon, False)
    sums = kernels().moments(View.of(x, 1, None).x, None, exchange.grid)
    signature = LayerSignature(limbs.shape[1], "float32", layer.momentum, layer.epsilon, grid=exchange.fingerprint)
    step = iter(range(1, 2**40))

    def once() -> None:
        world.exchange(Call(Operation.SUMS, ExchangeKey("a", Direction.FORWARD, next(step)), signature), sums)

    return once, world


def by_layer(address: str, rank: int, ranks: int, channels: int) -> tuple[Callable[[], None], World]:
    """One training call."""
    world = World(ServiceTransport(address, "bench-layer", rank, ranks), install=False)
    layer = BatchNormalization(synchronized=True, name="a", collective=world)
    x = np.random.default_rng(rank).normal(size=(8, channels)).astype(np.float32)

    def once() -> None:
        layer(x, training=True)

    return once, world


def run_rank(given: argparse.Namespace) -> None:
    """Take all ways in turns; rank 0 prints the seconds of each block."""
    limbs = np.ones((_ROWS, given.channels), np.int64)
    where = json.loads(given.where)
    service, one = by_service(where["service"], given.rank, given.ranks, limbs)
    stream, two = by_service(where["service"], given.rank, given.ranks, limbs, local_socket=False)
    journal, three = by_service(where["journal"], given.rank, given.ranks, limbs)
    layer, four = by_layer(where["service"], given.rank, given.ranks, given.channels)
    ways: dict[str, Callable[[], None]] = {
        "socket": by_socket(where["socket"], limbs),
        "grpc": by_grpc(where["grpc"], limbs),
        "service": service,
        "stream": stream,
        "journal": journal,
        "layer": layer,
    }
    blocks: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.blocks + 1):
        for name, exchange in ways.items():
            start = time.perf_counter()
            for _ in range(given.exchanges):
                exchange()
            if number:  # the first one warms up
                blocks[name].append((time.perf_counter() - start) / given.exchanges)
    if given.rank == 0:
        print(json.dumps(blocks), flush=True)
    for world in (one, two, three, four):
        world.leave()
    os._exit(0)  # the bare stream of gRPC has no goodbye


# ---- the whole ----


@contextmanager
def started(*commands: tuple[str, ...]) -> Iterator[list[str]]:
    """Servers; yields the last word of each one's first line."""
    processes: list[subprocess.Popen[str]] = []
    try:
        processes.extend(
            subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) for command in commands
        )
        yield [process.stdout.readline().split()[-1] for process in processes if process.stdout is not None]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def measure(given: argparse.Namespace) -> dict[str, list[float]]:
    """The seconds per exchange of every block, by way."""
    script = str(Path(__file__))
    size = _ROWS * given.channels * 8
    daemon = ("-m", "bnserver", "--log-level", "error", "--listen", "127.0.0.1:0")
    with (
        tempfile.TemporaryDirectory() as folder,
        started(
            (script, "--serve", "socket", "--ranks", str(given.ranks), "--size", str(size)),
            (script, "--serve", "grpc", "--ranks", str(given.ranks)),
            daemon,
            (*daemon, "--state-dir", folder),
        ) as (raw, bare, service, journal),
    ):
        where = json.dumps({"socket": int(raw), "grpc": int(bare), "service": service, "journal": journal})
        shape = ("--ranks", str(given.ranks), "--channels", str(given.channels))
        length = ("--blocks", str(given.blocks), "--exchanges", str(given.exchanges))
        ranks = [
            subprocess.Popen(
                [sys.executable, script, *shape, *length, "--rank", str(rank), "--where", where],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(given.ranks)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
    blocks: dict[str, list[float]] = json.loads(outputs[0])
    return blocks


def figures(ranks: int, repetitions: int) -> dict[str, float]:
    """What the suite shows: service/R ranks/C=…/ and socket, grpc, exchange, stream, journal; and ratios."""
    results: dict[str, float] = {}
    for channels in (64, 256, 1024, 2048):
        given = argparse.Namespace(ranks=ranks, channels=channels, blocks=10, exchanges=max(10, repetitions // 10))
        median = {name: statistics.median(seconds) for name, seconds in measure(given).items()}
        at = f"service/{ranks} ranks/C={channels}"
        results |= {f"{at}/{name}": median[name] for name in ("socket", "grpc", "stream", "journal", "layer")}
        results[f"{at}/exchange"] = median["service"]
        results[f"{at}/exchange ÷ socket"] = median["service"] / median["socket"]
        results[f"{at}/stream ÷ socket"] = median["stream"] / median["socket"]
        results[f"{at}/journal ÷ exchange"] = median["journal"] / median["service"]
    return results


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes; %(default)s if not given")
    parser.add_argument("--channels", type=int, default=256, help="of the layer; %(default)s if not given")
    parser.add_argument("--blocks", type=int, default=20, help="per way; %(default)s if not given")
    parser.add_argument("--exchanges", type=int, default=200, help="per block; %(default)s if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    for hidden in ("--serve", "--where"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--rank", "--size"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve == "socket":
        serve_socket(given.ranks, given.size)
    elif given.serve == "grpc":
        serve_grpc(given.ranks)
    elif given.where:
        run_rank(given)
    else:
        report(given, measure(given))


def report(given: argparse.Namespace, blocks: dict[str, list[float]]) -> None:
    """The table, and the file."""
    load = os.getloadavg()
    median = {name: statistics.median(seconds) for name, seconds in blocks.items()}
    print(f"{given.ranks} ranks, {given.channels} channels, {given.blocks} blocks of {given.exchanges} exchanges")
    print(f"load average {load[0]:.2f} {load[1]:.2f} {load[2]:.2f} on {os.cpu_count()} cores\n")
    print(f"{'':10}{'µs':>8}{'10 %':>8}{'90 %':>8}{'÷ socket':>10}{'÷ grpc':>8}")
    for name in _WAYS:
        low, *_, high = statistics.quantiles(blocks[name], n=10)
        ratios = f"{median[name] / median['socket']:10.2f}{median[name] / median['grpc']:8.2f}"
        print(f"{name:10}{1e6 * median[name]:8.0f}{1e6 * low:8.0f}{1e6 * high:8.0f}{ratios}")
    print(f"\njournal ÷ service {median['journal'] / median['service']:.3f}")
    if given.json is not None:
        document = {"ranks": given.ranks, "channels": given.channels, "load": load, "seconds": blocks, "median": median}
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
