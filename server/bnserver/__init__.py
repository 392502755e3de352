"""The statistics service: reduces what the ranks of a job contribute, and owns their moving statistics.

`core` decides and `daemon` acts: the core takes events and returns effects, and knows no wire, clock or file.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`__version__`, the installed distribution's."""
    if name == "__version__":
        from importlib.metadata import version

        return version("bnlayer")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
