"""Process groups of `torch.distributed` as worlds: joined explicitly, or used by layers where no world was joined.

torch itself is imported only where the process has done so already.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

from bnworker.transports import Transport
from bnworker.world import World

_TIMEOUT_S = 300.0  # `join`'s default

# The worlds that nobody joined, by process group. A group that was destroyed takes its world along.
_worlds: WeakKeyDictionary[Any, World] = WeakKeyDictionary()


def is_initialized() -> bool:
    """Whether this process has initialized torch.distributed."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_available() and distributed.is_initialized())


def world_over(group: Any = None) -> World | None:
    """The world of a process group's ranks, the same one at each call; every rank of the group makes it.

    Args:
        group: a `torch.distributed.ProcessGroup`; None: the default group.

    Returns:
        None where torch.distributed is not initialized.

    Raises:
        ValueError: this process does not belong to the group.
        PeerLostError: not all ranks of the group came in time.
    """
    if not is_initialized():
        return None
    if group is None:
        group = sys.modules["torch.distributed"].group.WORLD
    world = _worlds.get(group)
    if world is None:
        from bnworker.transports.torch import TorchTransport

        world = _worlds[group] = World(TorchTransport(group, timeout=_TIMEOUT_S), joined=False)
    return world


def opened(rank: int | None, world_size: int | None, timeout: float, deterministic: bool) -> Transport:
    """The default process group as a transport.

    Raises:
        ValueError: torch.distributed is not initialized, or knows this process by another rank.
        PeerLostError: not all ranks came in time.
    """
    if not is_initialized():
        raise ValueError(
            "transport 'torch' is the process group of torch.distributed, which is not initialized: call "
            "torch.distributed.init_process_group() before bnworker.join()."
        )
    from bnworker.transports.torch import TorchTransport

    distributed = sys.modules["torch.distributed"]
    in_group = distributed.get_rank(), distributed.get_world_size()
    if rank is not None and (rank, world_size) != in_group:
        raise ValueError(
            f"This process is rank {rank} of {world_size} by its arguments or environment, but rank {in_group[0]} of "
            f"{in_group[1]} in the process group of torch.distributed. Give no rank= and world_size=, or the same ones."
        )
    return TorchTransport(timeout=timeout, deterministic=deterministic)
