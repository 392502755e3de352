"""A statistics service of a test's own, on a port the kernel chose, gone after the test."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bnworker import World
from bnworker.transports.service import ServiceTransport
from support.contract import BODIES
from support.contract.timing import Watch, watch


@contextmanager
def daemon(*arguments: str, prefix: Sequence[str] = ()) -> Iterator[str]:
    """Run `python -m bnserver` for the length of a `with` block, behind a command; yields its address."""
    command = [*prefix, sys.executable, "-m", "bnserver", "--listen", "127.0.0.1:0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("bnserver listening on "), line
            yield line.rsplit(" ", 1)[1].strip()
        finally:
            process.terminate()
            try:
                process.wait(150)
            except subprocess.TimeoutExpired:
                process.kill()


def run_threads(
    address: str, job: str, world_size: int, name: str, *, local_socket: bool
) -> tuple[list[Any], list[Watch]]:
    """Run a body of the contract on ranks that are threads; what each saw or raised, and when, in rank order."""
    results: list[Any] = [AssertionError("this rank hangs")] * world_size
    watches = [Watch()] * world_size

    def rank(number: int) -> None:
        try:
            transport = ServiceTransport(address, job, number, world_size, timeout=60, local_socket=local_socket)
            watches[number] = watch(transport)
            with World(transport, install=False) as world:
                results[number] = BODIES[name].run(world)
        except BaseException as error:  # noqa: BLE001 - a thread's exception is one of the results
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    return results, watches
