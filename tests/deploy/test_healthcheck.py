"""The image's health check, as the container runs it, against a real health service on loopback."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

pytestmark = pytest.mark.rpc

_SCRIPT = Path(__file__).parents[2] / "deploy/docker/healthcheck.py"


@pytest.fixture
def service() -> Iterator[tuple[health.HealthServicer, str]]:
    """A health service and its address."""
    servicer = health.HealthServicer()
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield servicer, f"127.0.0.1:{port}"
        server.stop(grace=None).wait()


def test_a_serving_service_is_healthy(service: tuple[health.HealthServicer, str]) -> None:
    """The container is not restarted while it serves."""
    _, address = service
    assert _check(address) == (0, "")


def test_a_service_that_recovers_is_not_healthy(service: tuple[health.HealthServicer, str]) -> None:
    """NOT_SERVING keeps the container out of use."""
    servicer, address = service
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert _check(address) == (1, f"{address}: expected SERVING, received NOT_SERVING\n")


def test_nobody_at_the_address_is_not_healthy(service: tuple[health.HealthServicer, str]) -> None:
    """A stopped daemon is told from a healthy one, by a sentence instead of a traceback."""
    _, address = service
    elsewhere = address.replace("127.0.0.1", "127.0.0.2")  # the same port, where nothing listens
    status, reported = _check(elsewhere)
    assert status == 1
    assert reported.startswith(f"{elsewhere}: expected SERVING, received UNAVAILABLE: ")


def _check(address: str) -> tuple[int, str]:
    """Exit status and stderr of the script."""
    done = subprocess.run([sys.executable, _SCRIPT, address], capture_output=True, text=True, check=False, timeout=200)
    return done.returncode, done.stderr
