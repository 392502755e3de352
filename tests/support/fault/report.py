"""What a campaign found: how often, how long it took, and what was wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Times:
    """Measured seconds, and what is promised of them.

    Attributes:
        what: was measured.
        bound: what the promise says.
        share: of the measurements that it speaks of, e.g. 0.99; 1: all.
        seconds: what was seen.
    """

    what: str
    bound: float
    share: float = 1.0
    seconds: list[float] = field(default_factory=list)

    def at(self, share: float) -> float:
        """The time that this share of all measurements did not exceed; NaN without any."""
        ordered = sorted(self.seconds)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan

    @property
    def is_within_bound(self) -> bool:
        """Whether the promise was."""
        return not self.seconds or self.at(self.share) <= self.bound

    def __str__(self) -> str:
        name = "max" if self.share == 1.0 else f"p{self.share * 100:g}"
        return (
            f"{self.what}: p50 {self.at(0.5):.3f}, p99 {self.at(0.99):.3f}, max {self.at(1.0):.3f} s "
            f"(n {len(self.seconds)}, promised {name} <= {self.bound:g} s)"
        )


@dataclass
class Report:
    """One campaign.

    Attributes:
        name: of the campaign, with its seed.
        done: what was done, in words.
        times: what was measured.
        wrong: each violation of a promise, with what is needed to see it again.
        story: what happened, a line each.
    """

    name: str
    done: str = ""
    times: list[Times] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    @property
    def violations(self) -> list[str]:
        """All that is wrong, broken time limits included."""
        return self.wrong + [f"{self.name}: too slow: {times}" for times in self.times if not times.is_within_bound]

    def same(self, what: str, received: object, expected: object) -> None:
        """Note down a difference."""
        if received != expected:
            self.wrong.append(f"{self.name}: {what}: expected {expected}, found {received}")

    def add(self, lines: Sequence[str]) -> None:
        """Note down what else is wrong."""
        self.wrong += [f"{self.name}: {line}" for line in lines]

    def __str__(self) -> str:
        lines = [f"{'FAILED' if self.violations else 'kept'}  {self.name}: {self.done}"]
        lines += [f"        {times}" for times in self.times]
        lines += [f"        WRONG {line}" for line in self.violations]
        return "\n".join(lines)
