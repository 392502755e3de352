"""Whether the calls of a job's ranks agree: a pure function, used by the service and by MPI alike.

Laws:
1. Calls with different keys wait for each other: `StallError`.
2. Calls with one key and different signatures disagree: `MismatchError`, which blames the fewest ranks.
3. A rank that left with a failure is lost: `PeerLostError`; one that left cleanly stalls those that wait.
4. Every rank gets the same text; layer and step are those of the rank that gets the error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import islice

from bnlayer.collective import Call
from bnlayer.errors import CollectiveError, MismatchError, PeerLostError, StallError
from bnlayer.fingerprint import digest

_GROUPS_SHOWN = 8  # of ranks that each have something else, which may be all of a large job
_RANKS_SHOWN = 20  # of one group
RANKS_BLAMED = 4096  # in the attribute of an error; the numbers beyond it help nobody
_CHARACTERS_SHOWN = 2_000  # of a text that another process gave
# What ranks set by hand; and which other fields differ because of it: another grid may have to be probed first.
_WHAT = {"state": "moving statistics or grids", "weights": "gamma or beta"}
_MEND = {
    "state": "over a service, world.push(layer) on one rank, and then world.pull(layer) on the others",
    "weights": "if each rank is to have its own gamma and beta: BatchNormalization(..., own_weights=True)",
}
_SET = set(_WHAT)
_FOLLOWS = {"operation", "grid", "shape", "pushed"}
_SHOWN = 300  # characters of one value in an error: a list of a thousand arrays would bury the sentence


def shown(text: str, most: int = _CHARACTERS_SHOWN) -> str:
    """A text of another process as errors and logs show it: of bounded length, on one line, without control characters.

    Args:
        text: whatever it gave: a host name, the reason of a failure.
        most: characters of it.
    """
    more = f"… ({len(text)} characters)" if len(text) > most else ""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most]) + more


def listed(items: Iterable[str], count: int, *, most: int = _GROUPS_SHOWN, joint: str = "; ") -> str:
    """The first of many items, and how many more there are.

    Args:
        items: no more of them are looked at than are shown.
        count: how many there are.
        most: how many are shown.
        joint: between them.
    """
    more = f" and {count - most} more" if count > most else ""
    return joint.join(islice(items, most)) + more


@dataclass(frozen=True, slots=True)
class Peer:
    """A rank as errors name it."""

    rank: int
    host: str = ""
    pid: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})" if self.host else f"rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why an exchange can't complete, the same for every rank.

    Attributes:
        kind: the class of the error.
        text: its text.
        ranks: whom it blames; of very many, the first `RANKS_BLAMED`.
    """

    kind: type[CollectiveError]
    text: str
    ranks: tuple[int, ...]

    def error(self, call: Call | None) -> CollectiveError:
        """The error for one rank, which made `call` (None: it was not waiting)."""
        key = call.key if call is not None else None
        return self.kind(
            self.text,
            ranks=self.ranks,
            layer=key.layer if key is not None else None,
            step=key.step if key is not None else None,
        )


def check_agreement(calls: Mapping[int, Call], left: Mapping[int, str], peers: Mapping[int, Peer]) -> Verdict | None:
    """Say why these calls can't be answered; None if they can.

    Args:
        calls: the call of each waiting rank.
        left: ranks that have left, with the reason of their failure ("" for a clean leave).
        peers: how to name the ranks; a rank not in it is named by its number alone.

    Returns:
        None if no rank has left and all calls are equal.
    """
    failed = {rank: reason for rank, reason in sorted(left.items()) if reason}
    if failed:
        who = listed((f"{_name(rank, peers)} {reason}" for rank, reason in failed.items()), len(failed))
        return Verdict(PeerLostError, f"{who}. {_waiting(calls, peers)}.", tuple(failed))
    if not calls:
        return None
    if left:
        who = f"{_names(left, peers)} left the job"
        return Verdict(
            StallError,
            f"{who}, while {_waiting(calls, peers)}. Every rank must make the same calls; "
            "look for an early return, a break, or a shard with fewer steps.",
            tuple(sorted(left)),
        )
    if len({call.key for call in calls.values()}) > 1:
        return Verdict(
            StallError,
            f"The ranks wait for each other: {_waiting(calls, peers)}. Every rank must call the same layers in the "
            "same order, in the same mode; look for a skipped layer, or one in evaluation or frozen on some ranks.",
            _minority({rank: call.key for rank, call in calls.items()}),
        )
    return _mismatch(calls, peers)


def _mismatch(calls: Mapping[int, Call], peers: Mapping[int, Peer]) -> Verdict | None:
    if len(set(calls.values())) == 1:
        return None
    descriptions = {rank: _description(call) for rank, call in calls.items()}
    names = [name for name in descriptions[min(descriptions)] if len({b.get(name) for b in descriptions.values()}) > 1]
    by_hand = _SET & set(names)
    if by_hand and not set(names) - by_hand - _FOLLOWS:
        return _set_apart(calls, [name for name in names if name in by_hand], peers)
    names = [name for name in names if name not in by_hand]
    if "operation" in names:
        names = ["operation"]  # different operations have different signatures: listing those too would distract
    blamed = _minority(dict(calls))
    lines = []
    for name in names:
        held = defaultdict(list)
        for rank, description in sorted(descriptions.items()):
            held[description.get(name, "none")].append(rank)
        ordered = sorted(held.items(), key=lambda item: (len(item[1]), item[1]))
        label = "layers" if name == "arrays" and calls[min(calls)].synchronizes else name
        sent = (f"{_names(ranks, peers)} sent {value}" for value, ranks in ordered)
        lines.append(f"{label}: " + listed(sent, len(ordered), joint=", "))
    first = calls[min(calls)]
    key = first.where if first.synchronizes else first.key
    advice = f"check the configuration of {_names(blamed, {})}" if len(blamed) < len(calls) else "compare their code"
    return Verdict(
        MismatchError,
        f"{key}: {'; '.join(lines)}. All ranks must build the same model and make the same calls; {advice}.",
        blamed,
    )


def _set_apart(calls: Mapping[int, Call], names: Iterable[str], peers: Mapping[int, Peer]) -> Verdict:
    """The verdict on weights that differ at an enrolment, or weights or statistics not set alike on all ranks."""
    key = calls[min(calls)].key
    blamed: set[int] = set()
    lines = []
    for name in names:
        by_rank = {rank: getattr(call.signature, name) for rank, call in sorted(calls.items())}
        without = [rank for rank, value in by_rank.items() if not value]
        groups = defaultdict(list)
        for rank, value in by_rank.items():
            groups[value or None].append(rank)
        ordered = sorted((ranks for value, ranks in groups.items() if value), key=lambda ranks: (len(ranks), ranks))
        groups_shown = [_names(ranks, peers) for ranks in ordered[:_GROUPS_SHOWN]]
        groups_shown += [f"{len(ordered) - _GROUPS_SHOWN} more groups"] * (len(ordered) > _GROUPS_SHOWN)
        if len(ordered) == 1:
            blamed.update(ordered[0])
            lines.append(f"{_WHAT[name]} were set on {groups_shown[0]}, but not on {_names(without, peers)}")
            continue
        blamed.update(_minority(by_rank))
        if key.direction is None:
            lines.append(f"{_WHAT[name]} differ between {' and '.join(groups_shown)}")
        else:
            rest = f", and not on {_names(without, peers)}" if without else ""
            lines.append(f"{_WHAT[name]} were set differently on {' and on '.join(groups_shown)}{rest}")
    first = "Load the same ones" if key.direction is None else "Set them alike"
    advice = [
        f"{first} on every rank",
        "give every rank rank 0's: world.synchronize([layer])",
        *(_MEND[name] for name in names),
    ]
    return Verdict(MismatchError, f"{key}: {'; '.join(lines)}. {'; or '.join(advice)}.", tuple(sorted(blamed)))


def _description(call: Call) -> dict[str, str]:
    description = {
        "operation": str(call.operation),
        "attempt": str(call.attempt),
        "training call (forward step)": str(call.forward_step),
    }
    for field in fields(call.signature):
        value = getattr(call.signature, field.name)
        text = f"{value:016x}" if field.name == "grid" else str(value)
        if len(text) > _SHOWN:
            name = digest(text.encode(), 4).hex()
            text = f"{text[:_SHOWN]}… ({len(text)} characters, {name})"
        description[field.name] = text
    return description


def _minority(by_rank: Mapping[int, object]) -> tuple[int, ...]:
    """The ranks outside the largest group with equal values; all of them when two groups are largest."""
    groups: dict[object, list[int]] = defaultdict(list)
    for rank, value in by_rank.items():
        groups[value].append(rank)
    largest = max(len(ranks) for ranks in groups.values())
    if sum(len(ranks) == largest for ranks in groups.values()) > 1:
        return tuple(sorted(by_rank))
    return tuple(sorted(rank for ranks in groups.values() if len(ranks) < largest for rank in ranks))


def _waiting(calls: Mapping[int, Call], peers: Mapping[int, Peer]) -> str:
    ranks_by_call: dict[str, list[int]] = defaultdict(list)
    for rank, call in sorted(calls.items()):
        ranks_by_call[call.where].append(rank)
    if not ranks_by_call:
        return "nobody waited for it"
    waiting = (
        f"{_names(ranks, peers)} {'waits' if len(ranks) == 1 else 'wait'} in {at}"
        for at, ranks in ranks_by_call.items()
    )
    return listed(waiting, len(ranks_by_call))


def _name(rank: int, peers: Mapping[int, Peer]) -> str:
    return str(peers.get(rank, Peer(rank)))


def _names(ranks: Iterable[int], peers: Mapping[int, Peer]) -> str:
    ranks = sorted(ranks)
    if len(ranks) == 1:
        return _name(ranks[0], peers)
    if any(rank in peers for rank in ranks) and len(ranks) <= 4:
        return ", ".join(_name(rank, peers) for rank in ranks)
    return "ranks " + listed(map(str, ranks), len(ranks), most=_RANKS_SHOWN, joint=", ")
