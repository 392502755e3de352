"""What the suite consists of: each section returns its figures by name, `section/…`.

A section is imported when it runs, after the peers' threads were limited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Figures = dict[str, float]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        full: everything, rather than what fits into three minutes.
        peers: versions of those that are installed; None for those that are not.
        tensorflow_python: the interpreter that has TensorFlow.
        shapes: the kernels' shapes to run; empty for all.
        say: where progress goes.
    """

    full: bool
    peers: Mapping[str, str | None]
    tensorflow_python: str
    shapes: tuple[str, ...]
    say: Say

    @property
    def missing(self) -> list[str]:
        """The peers that are not installed."""
        return [name for name, version in self.peers.items() if version is None]

    @property
    def available(self) -> list[str]:
        """The peers that are installed."""
        return [name for name, version in self.peers.items() if version is not None]


def kernels(settings: Settings) -> Figures:
    """The passes over the data, by shape."""
    from benchmarks.kernels import SHAPES, measure
    from benchmarks.timing import keep_memory

    keep_memory()
    found: Figures = {}
    for shape in SHAPES:
        if not settings.shapes or str(shape) in settings.shapes:
            settings.say(f"kernels {shape}")
            found |= measure(shape, 20.0 if settings.full else 5.0, settings.available)
    return found


SECTIONS: dict[str, Callable[[Settings], Figures]] = {
    "kernels": kernels,
}
