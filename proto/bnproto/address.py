"""Addresses as they are written: HOST:PORT, an IPv6 host in brackets."""

from __future__ import annotations

import ipaddress


def split(address: str) -> tuple[str, int] | None:
    """The host, without brackets, and the port; None if it is no address.

    `::1:0` is none: nothing says where its host ends.
    """
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    if not bare or set(bare) & set("/[]") or (":" in bare) != bracketed or not port.isdecimal() or int(port) >= 2**16:
        return None
    return bare, int(port)


def hint(address: str) -> str:
    """How to write an address that `split` refuses for want of brackets; "" if that is not why."""
    host, _, port = address.rpartition(":")
    if ":" not in host or split(f"[{host}]:{port}") is None:
        return ""
    return f" An IPv6 host stands in brackets: [{host}]:{port}."


def is_loopback(host: str) -> bool:
    """Whether a host, as `split` returns it, is this machine and can't be reached from another one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
