"""Fault injection at named points of the daemon: for tests, and inert unless one environment variable is set.

    BNSERVER_FAILPOINTS="after-journal=kill:7"              SIGKILL to itself, the seventh time it comes there
    BNSERVER_FAILPOINTS="before-reply=drop:3,tick=stop:50"  the third reply is lost with its connection; SIGSTOP later

A point is `NAME=ACTION[:HIT]`; HIT is 1 where it is not given, and nothing happens before or after that hit.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum

from bnlayer.environment import variable

VARIABLE = "BNSERVER_FAILPOINTS"

POINTS = {
    "before-event": "a request was read, and nothing was decided",
    "before-journal": "an entry is about to be written; no answer was sent",
    "in-journal": "half of an entry's bytes are written (kill, stop, full)",
    "after-journal": "an entry is written; no answer was sent",
    "before-reply": "a message is about to be sent to one rank (drop: it is lost, and the connection cut)",
    "after-reply": "a message was sent to one rank, and not to those whose turn comes later",
    "in-snapshot": "half of a snapshot's bytes are written aside (kill, stop, full)",
    "before-rename": "a snapshot is written aside, and not yet in its place",
    "after-rename": "a snapshot is in its place",
    "tick": "ten times a second",
}


class Action(StrEnum):
    """What happens at a point."""

    KILL = "kill"
    STOP = "stop"
    DROP = "drop"
    FULL = "full"


class FailpointError(ValueError):
    """The variable's value is invalid."""


class Failpoints:
    """The points that the variable names.

    Args:
        environ: where to look; without the variable nothing ever happens.

    Attributes:
        active: whether any point is named.

    Raises:
        FailpointError: a point or an action is unknown.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._asked: dict[str, list[tuple[Action, int]]] = {}
        self._hits: Counter[str] = Counter()
        for word in filter(None, (variable(environ or {}, VARIABLE) or "").split(",")):
            name, _, what = word.strip().partition("=")
            action, _, hit = what.partition(":")
            if name not in POINTS or action not in set(Action) or not (hit or "1").isdecimal():
                raise FailpointError(
                    f"{VARIABLE}: expected NAME=ACTION[:HIT] with one of the points {', '.join(POINTS)} and one of the "
                    f"actions {', '.join(Action)}; received {word!r}."
                )
            self._asked.setdefault(name, []).append((Action(action), int(hit or "1")))
        self.active = bool(self._asked)

    def armed(self, name: str) -> bool:
        """Whether a fault is set for a point."""
        return name in self._asked

    def reached(self, name: str) -> bool:
        """Called at a point: acts if its fault is due; returns whether something is to be dropped.

        Raises:
            OSError: the disk is "full".
        """
        if name not in self._asked:
            return False
        self._hits[name] += 1
        for action, hit in self._asked[name]:
            if hit == self._hits[name]:
                return _done(action)
        return False


def _done(action: Action) -> bool:
    match action:
        case Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Action.FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case Action.DROP:
            return True
    return False
