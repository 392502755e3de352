"""A real disk that is full, and has space again: jobs go on, and the health service reports it."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bnlayer import BatchNormalization
from bnproto.grpc_options import CLIENT_OPTIONS, SAVING_NAME, SERVICE_NAME
from bnworker import World
from bnworker.transports.service import ServiceTransport

pytestmark = [pytest.mark.rpc, pytest.mark.fault]

_X = np.arange(3000, dtype=np.float32).reshape(2, 1500)
_LIMIT_S = 150.0


class _Daemon:
    """A daemon whose state directory is a tmpfs of 1 MiB, in a mount namespace of its own: it ends with it."""

    def __init__(self, directory: Path) -> None:
        serve = f"mount -t tmpfs -o size=1m tmpfs {directory} && exec {sys.executable} -m bnserver"
        command = f"{serve} --listen 127.0.0.1:0 --state-dir {directory}"
        self.popen = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.address = self.popen.stdout.readline().rpartition(" ")[2].strip()
        self.directory = Path(f"/proc/{self.popen.pid}/root{directory}")
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.log.append(line)

    def until(self, pattern: str) -> None:
        """Wait for a line of the log."""
        deadline = time.monotonic() + _LIMIT_S
        while not any(re.search(pattern, line) for line in self.log):
            assert time.monotonic() < deadline, (pattern, self.log)
            time.sleep(0.01)

    def health(self, name: str) -> int:
        """What the health service says."""
        with grpc.insecure_channel(self.address, CLIENT_OPTIONS) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its types lack the calls
            return int(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60).status)

    def fill(self) -> None:
        """Leave no byte."""
        with suppress(OSError), (self.directory / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(1000))

    def make_room(self) -> None:
        """There is space again."""
        (self.directory / "ballast").unlink()


@contextmanager
def _daemon(directory: Path) -> Iterator[_Daemon]:
    directory.mkdir()
    daemon = _Daemon(directory)
    try:
        yield daemon
    finally:
        daemon.popen.kill()
        daemon.popen.wait()
        daemon._reader.join(150)
        for pipe in (daemon.popen.stdout, daemon.popen.stderr):
            assert pipe is not None
            pipe.close()


def test_a_full_disk_and_its_recovery(serve: Callable[..., Any], tmp_path: Path) -> None:
    """The job goes on in memory, log and health say so; with space again all of it is on disk, and outlives kill -9."""
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    with _daemon(tmp_path / "small") as daemon:
        world = World(ServiceTransport(daemon.address, "job", 0, 1, timeout=60.0), install=False)
        layer = BatchNormalization(synchronized=True, name="a", collective=world)
        layer(_X, training=True)
        assert daemon.health(SAVING_NAME) == serving
        daemon.fill()
        for _ in range(5):
            layer(_X, training=True)
        daemon.until(r"Job 'job' could not be saved to .*\.job: .*No space left on device. It goes on in memory; a new")
        assert (daemon.health(SAVING_NAME), daemon.health(SERVICE_NAME)) == (not_serving, serving)
        daemon.make_room()
        daemon.until(r"Job 'job' is saved again")
        assert daemon.health(SAVING_NAME) == serving
        for _ in range(5):
            layer(_X, training=True)
        assert sum("could not be saved" in line for line in daemon.log) == 1  # told once, not every second
        (path,) = daemon.directory.glob("*.job")
        kept = path.read_bytes()
        expected = layer.state
        daemon.popen.send_signal(signal.SIGKILL)
        world._transport._client.close(None)  # type: ignore[attr-defined]  # its service is gone for good
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / path.name).write_bytes(kept)
    service = serve("--state-dir", str(tmp_path / "kept"))
    with World(ServiceTransport(service.address, "job", 0, 1, timeout=60.0), install=False) as world:
        pulled = world.pull("a")
        assert pulled is not None
        assert {name: array.tobytes() for name, array in pulled.arrays().items()} == {
            name: array.tobytes() for name, array in expected.arrays().items()
        }
        assert pulled.version == 11
