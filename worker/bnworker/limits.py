"""How many ranks an elastic job may have: `MIN:MAX`, as a launcher and its ranks are told."""

from __future__ import annotations

import re
from dataclasses import dataclass

VARIABLE = "BNLAYER_ELASTIC"  # MIN:MAX, set by the launcher of an elastic job for its ranks
RESTARTED = "BNLAYER_RESTART_COUNT"  # how many ranks the launcher had started in place of lost ones, this one included

_MOST = 2**20  # the service has no room for more


@dataclass(frozen=True, slots=True)
class Limits:
    """How many ranks an elastic job may have.

    Attributes:
        minimum: fewer can't go on.
        maximum: more wait until one is lost.

    Raises:
        ValueError: they are out of range.
    """

    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum <= _MOST:
            raise ValueError(f"expected 1 <= MIN <= MAX <= {_MOST}, received {self.minimum}:{self.maximum}")

    @classmethod
    def parsed(cls, text: str) -> Limits:
        """From MIN:MAX.

        Raises:
            ValueError: it is malformed, or out of range.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text.strip(), re.ASCII)
        if match is None:
            raise ValueError(f"expected MIN:MAX, such as 2:8, received {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.minimum}:{self.maximum}"
