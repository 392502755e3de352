"""The console of every command. What is printed is text and never markup: names of files and data hold brackets."""

from __future__ import annotations

import sys

from rich.console import Console


def console(*, plain: bool = False) -> Console:
    """Standard output as it is now.

    Args:
        plain: lines even if it looks like a terminal.
    """
    return Console(file=sys.stdout, markup=False, emoji=False, highlight=False, force_terminal=False if plain else None)
