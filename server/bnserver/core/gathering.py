"""What is being gathered: the ranks' contributions to one operation, and what becomes of it.

Laws:
1. Its state changes as `STATES` says, and in no other way.
2. Integer limbs are added on arrival: the total does not depend on the order.
3. It is complete when every rank has sent the same call.
4. It is doomed when that can't happen any more: calls differ, or a rank has left or failed while others wait. It is
   then aborted as soon as every rank has called or left; otherwise after a short grace, in which the others may still
   call, so that the error can name where each of them is.
"""

from __future__ import annotations

from enum import Enum, auto

import numpy as np

from bnlayer.collective import Call, Operation
from bnlayer.state import LayerState
from bnserver.core.events import Body, Limbs, Replacing

GRACE_S = 0.4  # ranks get an error within 1 s: this, one tick, and the network


class State(Enum):
    """Where an operation is."""

    IDLE = auto()  # no rank waits, and none has left
    GATHERING = auto()  # some ranks wait, and all calls so far are equal
    DEPARTED = auto()  # no rank waits; some have left cleanly, so who calls now waits in vain
    DOOMED = auto()  # it can't be completed any more
    COMPLETE = auto()
    ABORTED = auto()


class Happening(Enum):
    """What can happen to an operation."""

    SAME_CALL = auto()  # a rank calls: the first one, or like the others
    OTHER_CALL = auto()  # a rank calls something else
    LEAVES = auto()  # a rank leaves cleanly
    LEAVES_LAST = auto()  # likewise, and no other rank waits or has failed
    FAILS = auto()  # a rank leaves with a failure, or is lost
    ALL_ACCOUNTED_FOR = auto()  # every rank has called or left
    GRACE_OVER = auto()
    OVERDUE = auto()  # a rank has waited for longer than its timeout


STATES = {
    (State.IDLE, Happening.SAME_CALL): State.GATHERING,
    (State.IDLE, Happening.LEAVES_LAST): State.DEPARTED,
    (State.IDLE, Happening.FAILS): State.DOOMED,
    (State.GATHERING, Happening.SAME_CALL): State.GATHERING,
    (State.GATHERING, Happening.OTHER_CALL): State.DOOMED,
    (State.GATHERING, Happening.LEAVES): State.DOOMED,
    (State.GATHERING, Happening.LEAVES_LAST): State.DEPARTED,
    (State.GATHERING, Happening.FAILS): State.DOOMED,
    (State.GATHERING, Happening.ALL_ACCOUNTED_FOR): State.COMPLETE,
    (State.GATHERING, Happening.OVERDUE): State.ABORTED,
    (State.DEPARTED, Happening.SAME_CALL): State.DOOMED,
    (State.DEPARTED, Happening.LEAVES_LAST): State.DEPARTED,
    (State.DEPARTED, Happening.FAILS): State.DOOMED,
    (State.DEPARTED, Happening.ALL_ACCOUNTED_FOR): State.DEPARTED,
    (State.DOOMED, Happening.SAME_CALL): State.DOOMED,
    (State.DOOMED, Happening.OTHER_CALL): State.DOOMED,
    (State.DOOMED, Happening.LEAVES): State.DOOMED,
    (State.DOOMED, Happening.LEAVES_LAST): State.DEPARTED,  # those whose calls differed have left
    (State.DOOMED, Happening.FAILS): State.DOOMED,
    (State.DOOMED, Happening.ALL_ACCOUNTED_FOR): State.ABORTED,
    (State.DOOMED, Happening.GRACE_OVER): State.ABORTED,
    (State.ABORTED, Happening.FAILS): State.ABORTED,  # several ranks are lost at once
    (State.ABORTED, Happening.ALL_ACCOUNTED_FOR): State.ABORTED,
}


class Gathering:
    """One operation.

    Args:
        world_size: how many ranks take part.

    Attributes:
        state: where it is.
        calls: of the ranks that wait, by rank.
        bodies: what they sent, if it is not added up.
        limbs: the total so far.
        replacing: the state that they set by hand before.
        since: when the first of them called.
        arrivals: when each of them called, by rank, the first one first.
        is_overdue: whether it was aborted because a rank has waited for too long.
        straggling_logged_s: how long they had waited when the log last said so.
    """

    def __init__(self, world_size: int) -> None:
        self.state = State.IDLE
        self.calls: dict[int, Call] = {}
        self.bodies: dict[int, Body] = {}
        self.limbs: Limbs | None = None
        self.replacing: LayerState | None = None
        self.since = 0.0
        self.arrivals: dict[int, float] = {}
        self.is_overdue = False
        self.straggling_logged_s = 0.0
        self._outstanding = world_size
        self._deadlines: dict[int, float] = {}
        self._has_failed = False
        self._doomed_since: float | None = None

    def add(self, rank: int, call: Call, body: Body, now: float, deadline: float) -> None:
        """A rank calls. The limbs of all ranks are added here, on arrival, and nowhere else.

        Arrays of a plain reduction are kept until all ranks have called; `bnlayer.reduction` adds them in rank order.

        Args:
            rank: which.
            call: what it takes part in.
            body: its numbers.
            now: seconds.
            deadline: until when it waits.
        """
        first = next(iter(self.calls.values()), None)
        if first is None:
            self.since = now
        self.state = STATES[self.state, Happening.SAME_CALL if first is None or call == first else Happening.OTHER_CALL]
        self.calls[rank], self.arrivals[rank], self._deadlines[rank] = call, now, deadline
        if isinstance(body, Replacing):
            if rank == min(self.calls):  # they differ only in their versions
                self.replacing = body.state
            body = body.limbs
        if not isinstance(body, np.ndarray):
            self.bodies[rank] = body
        elif self.limbs is None:
            self.limbs = body.copy()
        elif self.state is State.GATHERING and call.operation is Operation.PROBE:
            np.maximum(self.limbs, body, out=self.limbs)
        elif self.state is State.GATHERING:
            self.limbs += body
        self._outstanding -= 1
        if self._outstanding == 0:
            self.state = STATES[self.state, Happening.ALL_ACCOUNTED_FOR]
        elif self.state is State.DOOMED:
            self._doom(now, now)

    def depart(self, rank: int, since: float, now: float, *, failed: bool) -> None:
        """A rank has left, or is lost; its call does not count any more.

        Args:
            rank: which.
            since: when it was last seen: if it failed, the others' grace began then.
            now: seconds.
            failed: whether it left with a failure.
        """
        if self.calls.pop(rank, None) is None:
            self._outstanding -= 1
        self.arrivals.pop(rank, None)
        self._deadlines.pop(rank, None)
        self._has_failed = self._has_failed or failed
        if failed:
            happening = Happening.FAILS
        else:
            happening = Happening.LEAVES if self.calls or self._has_failed else Happening.LEAVES_LAST
        self.state = STATES[self.state, happening]
        if self._outstanding == 0:
            self.state = STATES[self.state, Happening.ALL_ACCOUNTED_FOR]
        elif self.state is State.DOOMED:
            self._doom(since if failed else now, now)

    def wait(self, now: float) -> None:
        """Time has passed."""
        if self.state is State.DOOMED:
            self._doom(now, now)
        elif self.state is State.GATHERING and any(now >= deadline for deadline in self._deadlines.values()):
            self.state, self.is_overdue = STATES[self.state, Happening.OVERDUE], True

    def _doom(self, since: float, now: float) -> None:
        """It can't be completed since then, or since before that; abort it if the grace is over."""
        self._doomed_since = since if self._doomed_since is None else min(self._doomed_since, since)
        if now >= self._doomed_since + GRACE_S:
            self.state = STATES[self.state, Happening.GRACE_OVER]
