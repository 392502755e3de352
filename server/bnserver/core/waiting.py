"""Who waits for whom in a generation, and for how long: sums that grow with each operation.

The ranks of an operation contribute at t(1) <= … <= t(n), and it is complete at t(n):

    rank r waited for         t(n) − t(r)
    the last rank held up     t(n) − t(n−1)      the others; that is what they gain if this rank alone is made faster
    the operation took        t(n) − t(1)

An operation that is not complete counts up to now, so that a rank that never comes is seen while it is waited for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping

from bnlayer.collective import Call, Direction, Operation

# From what a local socket takes to what makes people look: each is about three times the one before.
BOUNDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

_WINDOW_S = 30.0  # a straggler is judged by the last one to two of these
_HELD_UP = 0.05  # of that time, by one rank alone: less is what any two processes differ by

Kind = tuple[Operation, Direction | None]


class Histogram:
    """How often something took how long.

    Attributes:
        counts: of those up to each of `BOUNDS`, and of the longer ones; not cumulative.
        seconds: of all together.
    """

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        """It took so long once more."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


class Waiting:
    """The sums of one generation.

    Attributes:
        operations: how many are complete, by kind.
        took: how long they took, from the first rank's contribution to the last one's.
        waited: seconds, by rank.
        held_up: seconds, by rank.
    """

    def __init__(self) -> None:
        self.operations: defaultdict[Kind, int] = defaultdict(int)
        self.took = Histogram()
        self.waited: defaultdict[int, float] = defaultdict(float)
        self.held_up: defaultdict[int, float] = defaultdict(float)
        self._window = (0.0, dict[int, float]())  # since when, and what `held_up` was then
        self._before = self._window

    def begin(self, now: float) -> None:
        """All ranks are there."""
        self._window = self._before = (now, dict(self.held_up))

    def completed(self, call: Call, arrivals: dict[int, float], now: float) -> None:
        """An operation is complete.

        Args:
            call: of all ranks.
            arrivals: when each contributed, the first one first.
            now: when the last one did.
        """
        self.operations[call.operation, call.key.direction] += 1
        times = [*arrivals.values()]
        self.took.observe(now - times[0])
        if now == times[0]:
            return
        for rank, time in arrivals.items():
            self.waited[rank] += now - time
        self.held_up[next(reversed(arrivals))] += now - times[-2]

    def tick(self, now: float) -> None:
        """Time has passed: begin another window, if it is time."""
        if now >= self._window[0] + _WINDOW_S:
            self._before, self._window = self._window, (now, dict(self.held_up))

    def straggler(self, held_up: Mapping[int, float], now: float) -> int | None:
        """The rank that has lately held up the others more than all other ranks together, and noticeably; if any.

        Args:
            held_up: by rank, the operation in progress included.
            now: seconds.
        """
        since, before = self._before
        lately = {rank: seconds - before.get(rank, 0.0) for rank, seconds in held_up.items()}
        if not lately:
            return None
        worst = max(lately, key=lambda rank: lately[rank])
        is_worst = lately[worst] * 2 > sum(lately.values())
        return worst if is_worst and lately[worst] > _HELD_UP * (now - since) else None
