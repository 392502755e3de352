"""What errors and the log say of ranks that wait, and of those that they wait for."""

from __future__ import annotations

from itertools import islice

from bnlayer.agreement import RANKS_BLAMED, Peer, Verdict, listed
from bnlayer.collective import Call
from bnlayer.errors import PeerLostError
from bnserver.core.gathering import Gathering
from bnserver.core.members import Membership

_RANKS_SHOWN = 20  # of those that never joined, which may be all of a large job


def seen(rank: int, members: Membership, gathering: Gathering, latest: Call | None) -> str:
    """Where a rank was last seen.

    Args:
        rank: one that is here.
        members: the ranks.
        gathering: the operation that they are in.
        latest: the last one that is complete.
    """
    member = members.here.get(rank)
    call = (member.seen if member is not None else None) or latest
    how = "waiting in" if rank in gathering.calls else "completing"
    return f"last seen {how} {call.where}" if call is not None else "last seen joining"


def not_joined(members: Membership, world_size: int) -> Verdict:
    """The error of ranks whose time to wait for the others to join is over."""
    # A rank may have announced a world of any size: what this costs depends on the ranks that are here.
    missing, count = tuple(islice(members.others(set(members.here)), RANKS_BLAMED)), world_size - len(members.here)
    here = (str(member.peer) for _, member in sorted(members.here.items()))
    return Verdict(
        PeerLostError,
        f"Rank{'s' if count > 1 else ''} {listed(map(str, missing), count, most=_RANKS_SHOWN, joint=', ')} of "
        f"{world_size} did not join in time; {listed(here, len(members.here), joint=', ')} waited. Start every rank "
        f"with the same job name and world size ({world_size}), or wait longer: timeout=.",
        missing,
    )


def overdue(members: Membership, gathering: Gathering, latest: Call | None) -> Verdict:
    """The error of ranks whose time to wait in an operation is over."""
    missing = tuple(members.others(set(gathering.calls) | set(members.left)))
    timeout = min(members.here[rank].timeout for rank in gathering.calls)
    names = (
        f"{members.peers[rank]} did not take part within {timeout:g} s, {seen(rank, members, gathering, latest)}"
        for rank in missing
    )
    waits = (f"{members.peers[rank]} waits in {call.where}" for rank, call in gathering.calls.items())
    who = f"{listed(names, len(missing))}; {listed(waits, len(gathering.calls))}"
    text = f"{who}. Look at what it is doing; if it is only slow, wait longer: timeout=."
    return Verdict(PeerLostError, text, missing[:RANKS_BLAMED])


def lost_answers(job: str, peer: Peer, answered: int, completed: int) -> str:
    """Why the ranks can't go on with a service that lacks what it answered to them.

    Args:
        job: theirs.
        peer: a rank that came back.
        answered: its last contribution to a layer that was answered.
        completed: the last one that the service knows of.
    """
    return (
        f"The service lost what the ranks of job {job!r} were told: {peer} knows of contribution {answered}, the "
        f"service's state directory of {completed}. The machine lost its power, its disk was full, or the directory "
        "is an old copy. Start the job again, from its checkpoint."
    )


def regroup(job: str) -> str:
    """What the ranks that are left of an elastic job do."""
    return (
        f"Job {job!r} is elastic: the ranks that are left form its next generation, and go on from the last state that "
        "was saved (bnworker.elastic)."
    )


def joiners(job: str, count: int) -> str:
    """Why the ranks of an elastic job regroup though none was lost."""
    who = "1 rank joins" if count == 1 else f"{count} ranks join"
    return (
        f"{who} elastic job {job!r}: all ranks form its next generation, and go on from the state that was saved last "
        "(bnworker.elastic)."
    )


def finished(job: str) -> str:
    """The error of a rank that joins too late."""
    return f"Elastic job {job!r} was finished by its other ranks before this one had joined: there is nothing to do."


def finished_meanwhile(job: str) -> str:
    """What a rank is told that was given up, and comes back when there is nothing left to come back to."""
    return f"Elastic job {job!r} was finished by its other ranks while this one was away: there is nothing to do."


def straggling(members: Membership, gathering: Gathering, latest: Call | None, waited: float) -> str:
    """Who keeps the others waiting, and for how long."""
    missing = tuple(members.others(set(gathering.calls) | set(members.left)))
    names = (f"{members.peers[rank]}, {seen(rank, members, gathering, latest)}" for rank in missing)
    verb = "keeps" if len(missing) == 1 else "keep"
    who, others = listed(names, len(missing), most=_RANKS_SHOWN), len(gathering.calls)
    return f"{who}, {verb} {others} other{'s' * (others > 1)} waiting for {waited:.1f} s"
