"""A statistics service for the ranks of torchrun, who need no address: rank 0 starts it, and torchrun's store has it.

torchrun's agent keeps a key-value store for the ranks that it starts, at `MASTER_ADDR:MASTER_PORT`. Rank 0 starts a
service beside itself and writes its address there; the others wait for it. The service ends with rank 0, however that
ends: its standard input is a pipe of rank 0's.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from bnlayer.environment import variable
from bnlayer.errors import ServiceError

_FAREWELL_S = 5.0  # for the other ranks to leave, before the service ends with rank 0
_LOOK_S = 5e-3

# The service reads nothing, so the end of its input is the end of the process that started it.
_WITH_ITS_PARENT = """\
import os, runpy, sys, threading
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
sys.argv[0] = "bnserver"
runpy.run_module("bnserver", run_name="__main__", alter_sys=True)
"""


def lacks_address(environ: Mapping[str, str], transport: str | None, address: str | None) -> bool:
    """Whether a rank of torchrun asks for the service, and nobody says where one is."""
    asked = transport or variable(environ, "BNLAYER_TRANSPORT")
    known = address or variable(environ, "BNLAYER_ADDRESS")
    return asked == "service" and not known and variable(environ, "TORCHELASTIC_USE_AGENT_STORE") == "True"


def service(environ: Mapping[str, str], timeout: float) -> tuple[str, str]:
    """Start a service, as rank 0, or wait for rank 0 to have started it.

    Args:
        environ: as torchrun made it.
        timeout: seconds to wait.

    Returns:
        Its address, and the job's name: torchrun's run.

    Raises:
        ServiceError: there is none within the time.
    """
    from torch.distributed import PrefixStore, TCPStore

    job = f"torchrun-{environ.get('TORCHELASTIC_RUN_ID', 'run')}-{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    agent = TCPStore(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), None, False, timedelta(seconds=timeout))
    store = PrefixStore(f"bnlayer/service/{job}", agent)
    ranks = int(environ["WORLD_SIZE"])
    if environ["RANK"] == "0":
        # Ranks on this machine alone: nobody else can reach the service.
        host = "127.0.0.1" if environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"] else environ["MASTER_ADDR"]
        process, address = _started(host)
        store.set("address", address)
        atexit.register(_end, process, store, ranks)
        return address, job
    atexit.register(_farewell, store)
    try:
        return store.get("address").decode(), job
    except RuntimeError as error:
        raise ServiceError(
            f"rank {environ['RANK']} found no service in torchrun's store within {timeout:g} s: rank 0 starts it when "
            "it calls bnworker.join(). Every rank must call it.",
            ranks=(0,),
        ) from error


def _started(host: str) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, "-P", "-c", _WITH_ITS_PARENT, "--listen", f"{host}:0", "--log-level", "warning"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    if not line.startswith("bnserver listening on "):
        process.kill()
        raise ServiceError(
            f"rank 0 could not start a statistics service at {host}: see its messages above.", ranks=(0,)
        )
    return process, line.rsplit(" ", 1)[1].strip()


def _farewell(store: Any) -> None:
    with suppress(RuntimeError):  # the agent may be gone
        store.add("left", 1)


def _end(process: subprocess.Popen[bytes], store: Any, ranks: int) -> None:
    """End the service, once the other ranks have left it."""
    end = time.monotonic() + _FAREWELL_S
    with suppress(RuntimeError):
        while store.add("left", 0) < ranks - 1 and time.monotonic() < end:
            time.sleep(_LOOK_S)
    assert process.stdin is not None
    process.stdin.close()
    process.wait()
