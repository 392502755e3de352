"""Whether anything listens at a service's address.

Checked before a job is started: a mistyped address is reported in one line, and not by every rank after its timeout.
"""

from __future__ import annotations

import queue
import socket
import threading
import time

from bnproto.address import hint, split
from bnworker.launcher.starting import LaunchError

_ANSWER_S = 5.0  # a connection around the world takes a second; a lost first packet one more
_PAUSE_S = 0.2  # between attempts, while a service is waited for


def reach(address: str, wait_s: float, answer_s: float = _ANSWER_S) -> None:
    """Make sure that something listens at an address.

    Args:
        address: HOST:PORT.
        wait_s: go on trying for so many seconds; an attempt that was begun gets its answer.
        answer_s: how long an attempt may take.

    Raises:
        LaunchError: nothing does, or it is no address.
    """
    host, port = _parsed(address)
    deadline = time.monotonic() + wait_s
    while (reason := _attempt(host, port, answer_s)) is not None:
        if time.monotonic() + _PAUSE_S > deadline:
            raise LaunchError(
                f"no statistics service at {address}: {reason}. Check the address (--address or BNLAYER_ADDRESS), or "
                f"start one there: bnlayer serve --listen {address}"
            )
        time.sleep(_PAUSE_S)


def _parsed(address: str) -> tuple[str, int]:
    parts = split(address)
    if parts is None or parts[1] == 0:
        raise LaunchError(
            f"expected an address HOST:PORT, such as 127.0.0.1:7431, received {address!r}.{hint(address)}"
        )
    return parts


def _attempt(host: str, port: int, answer_s: float) -> str | None:
    """Why the address can't be reached; None if it can.

    In a thread, which is abandoned after its time: nothing else limits how long a name lookup takes.
    """
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def connect() -> None:
        try:
            socket.create_connection((host, port), answer_s).close()
        except OSError as error:
            answers.put(error.strerror or str(error))
        else:
            answers.put(None)

    threading.Thread(target=connect, daemon=True).start()
    try:
        return answers.get(timeout=answer_s)
    except queue.Empty:
        return f"no answer within {answer_s:g} s"
