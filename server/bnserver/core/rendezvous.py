"""Ranks that wait for the next generation of an elastic job, and when it begins.

Laws:
1. It begins at once when all that are expected wait: those that were left of the generation before, or, if there was
   none, as many as were started together; and in any case when the job's maximum waits.
2. Of those that are expected, some may never come: it begins without them, once the job's minimum has waited for
   `LAST_CALL_S` (or `FIRST_CALL_S`, where processes are being started).
3. It never begins with fewer than the minimum, nor with more than the maximum: the others go on waiting, as spares.
4. Ranks of the generation before come first, in their order; then those that were started, in theirs.
5. Waiting ends with an error when the time to join of one of them is over.
"""

from __future__ import annotations

from dataclasses import dataclass

from bnserver.core.effects import Effect, Failed
from bnserver.core.events import Elastic, Join
from bnserver.core.reasons import Reason

# Those that are left got the error at once, and only finish what they compute: the others shall go on within 5 s.
LAST_CALL_S = 3.0
# From the first processes of a job to its last one: a busy machine takes seconds to start Python; torchrun's own value.
FIRST_CALL_S = 30.0

_SHOWN = 20  # ranks in an error


@dataclass(slots=True)
class Waiting:
    """A rank that waits.

    Attributes:
        join: what it said.
        deadline: until when it waits.
    """

    join: Join
    deadline: float


class Rendezvous:
    """The ranks of one elastic job that are in no generation.

    Args:
        job: its name.

    Attributes:
        waiting: by their connections, in the order in which they came.
        left: how many ranks of the generation before go on: `Generation.left`; 0: there was none.
        before: its number.
    """

    def __init__(self, job: str) -> None:
        self.waiting: dict[int, Waiting] = {}
        self.left = 0
        self.before = 0
        self._job = job
        self._enough_since: float | None = None

    @property
    def elastic(self) -> Elastic | None:
        """How many ranks the job may have, as those that wait say; None: no rank waits."""
        first = next(iter(self.waiting.values()), None)
        return first.join.elastic if first is not None else None

    def add(self, join: Join, now: float) -> None:
        """A rank waits from now on; its place of before, if it has connected anew, is not waited in any more."""
        earlier = [
            connection for connection, each in self.waiting.items() if each.join.incarnation == join.incarnation != 0
        ]
        for connection in earlier:
            del self.waiting[connection]
        self.waiting[join.connection] = Waiting(join, now + join.join_timeout)

    def remove(self, connection: int) -> None:
        """A rank does not wait any more."""
        self.waiting.pop(connection, None)

    def ended(self, number: int, left: int) -> None:
        """A generation is over, and so many of its ranks are left."""
        self.before, self.left, self._enough_since = number, left, None

    def is_due(self, now: float) -> bool:
        """Whether the next generation begins now; only asked where none is running."""
        elastic, count = self.elastic, len(self.waiting)
        if elastic is None or count < elastic.minimum:
            self._enough_since = None
            return False
        since = self._enough_since = now if self._enough_since is None else self._enough_since
        if count >= elastic.maximum:
            return True
        joins = [each.join for each in self.waiting.values()]
        if self.left:
            return self._number_returned() >= self.left or now >= since + LAST_CALL_S
        return count >= max(join.world_size for join in joins) or now >= since + FIRST_CALL_S

    def take(self) -> list[Waiting]:
        """Those that are in the next generation, in the order of their ranks; they don't wait any more."""
        elastic = self.elastic
        assert elastic is not None
        order = sorted(
            self.waiting.items(), key=lambda each: (-each[1].join.previous_generation, each[1].join.peer.rank)
        )
        chosen = order[: elastic.maximum]
        for connection, _ in chosen:
            del self.waiting[connection]
        self._enough_since = None
        return [each for _, each in chosen]

    def overdue(self, now: float, running: int) -> list[Effect]:
        """The errors of those that have waited for too long.

        Args:
            now: seconds.
            running: how many ranks the running generation has; 0: there is none, and all that wait need each other.
        """
        late = [connection for connection, each in self.waiting.items() if now >= each.deadline]
        if not late:
            return []
        if running:
            return [
                effect
                for connection in late
                for effect in self._fail(connection, self._why_still_waiting(connection, running))
            ]
        text = self._too_few()
        return [effect for connection in tuple(self.waiting) for effect in self._fail(connection, text)]

    def fail(self, reason: Reason, text: str) -> list[Effect]:
        """All that wait get an error."""
        return [effect for connection in tuple(self.waiting) for effect in self._fail(connection, text, reason)]

    def _fail(self, connection: int, text: str, reason: Reason = Reason.DEADLINE) -> list[Effect]:
        self.remove(connection)
        return [Failed(connection, reason, text)]

    def _number_returned(self) -> int:
        return sum(1 for each in self.waiting.values() if each.join.previous_generation == self.before)

    def _too_few(self) -> str:
        elastic = self.elastic
        assert elastic is not None
        peers = [str(each.join.peer) for each in self.waiting.values()]
        more = f" and {len(peers) - _SHOWN} more" if len(peers) > _SHOWN else ""
        seconds = min(each.join.join_timeout for each in self.waiting.values())
        return (
            f"Elastic job {self._job!r} needs {elastic.minimum} ranks or more (MIN:MAX is {elastic}), and has had "
            f"{len(peers)} for {seconds:g} s: {', '.join(peers[:_SHOWN])}{more}. Start more ranks with this job name, "
            "or allow fewer: min=, --elastic."
        )

    def _why_still_waiting(self, connection: int, running: int) -> str:
        join = self.waiting[connection].join
        assert join.elastic is not None
        waited = f"{join.peer} has waited for {join.join_timeout:g} s to join elastic job {self._job!r}, which"
        if running >= join.elastic.maximum:
            return (
                f"{waited} has all of its {running} ranks (MIN:MAX is {join.elastic}). Allow more ranks, or let spare "
                "ones wait longer: timeout=."
            )
        return (
            f"{waited} is running with {running} ranks, and they let nobody in: that happens where they commit. Let "
            "them commit more often, or let this one wait longer: timeout=."
        )
