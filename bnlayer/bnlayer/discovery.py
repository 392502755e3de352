"""Worlds that a library of this process has brought together itself: nobody has to join them.

An entry point of the group `bnlayer.collectives` is named for a module, and loads a function that returns the
collective over what this module has initialized: of a group of its ranks, or of all of them; None where it has
initialized nothing. It is looked at only once the module has been imported: a process without it pays nothing.

    [project.entry-points."bnlayer.collectives"]
    "torch.distributed" = "bnworker.process_groups:world_over"

The layer knows no wire: it finds transports by this name alone, as other plugins would be found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from bnlayer.collective import Collective

Finder = Callable[[Any], "Collective | None"]


def discovered(group: Any = None) -> Collective | None:
    """The collective of a library that has one.

    Args:
        group: of its ranks, as the library has them; None: all of them.
    """
    for entry in _entry_points():
        if entry.name in sys.modules:
            collective = _finder(entry)(group)
            if collective is not None:
                return collective
    return None


@cache
def _entry_points() -> tuple[EntryPoint, ...]:
    from importlib.metadata import entry_points  # a third of this package's import, for what few processes ask

    return tuple(entry_points(group="bnlayer.collectives"))


@cache
def _finder(entry: EntryPoint) -> Finder:
    finder: Finder = entry.load()
    return finder
