"""Ports that nothing listens on until a test does: below those that the kernel gives to outgoing connections.

One of the kernel's own choice may become another process's connection before it is listened on.
"""

from __future__ import annotations

import os
import socket
from itertools import cycle

_FIRST, _PORTS = 20_000, 12_000  # Linux's own begin at 32,768
_FAR = 787  # processes begin far from each other, those that were started one after the other too
_ports = cycle(range(_PORTS))


def free_port() -> int:
    """One that is free on this machine, and that this process has not given before."""
    for _ in range(_PORTS):
        port = _FIRST + (os.getpid() * _FAR + next(_ports)) % _PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError(f"no port is free from {_FIRST} to {_FIRST + _PORTS}")
