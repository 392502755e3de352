"""A rank's session and the service's core against each other, in memory: whatever breaks, everything counts once.

Hypothesis decides what is delivered next, which connection or local socket breaks and what is lost with it, and when
the service is killed and started again. The ranks' results and the owner's state are those of an undisturbed run, bit
for bit, and every rank leaves.
"""

from collections.abc import Sequence
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from support.session import Play
from support.session_program import train

_STEPS = 2
_CHOICES = 500
_ENOUGH = 20_000  # moves, where a run without faults needs a few hundred
_FAULTS = 14  # of 256 choices: with many more, nothing gets far enough to go wrong


def _play(choices: Sequence[int], local: tuple[bool, ...]) -> Play:
    """Do what the choices say, then whatever is left to do without a fault."""
    play = Play(lambda rank: train(rank, _STEPS), local)
    given = iter(choices)
    for choice in given:
        moves = play.moves()
        if choice < 256 - _FAULTS:
            if moves:
                moves[choice % len(moves)]()
            continue
        rank, delivered = choice % play.world_size, next(given, 0)
        match choice % 7:
            case 0:
                play.restart(shortened=delivered % 2 == 1)
            case 1 | 2:
                play.lose_channel(rank)
            case _:
                play.cut(rank, delivered % 4, delivered // 4 % 4)
    for number in range(_ENOUGH):
        if play.over:
            return play
        moves = play.moves()
        assert moves, [(rank.session.state, rank.results) for rank in play.ranks]
        moves[number % len(moves)]()
    raise AssertionError(f"not over: {[rank.session.state for rank in play.ranks]}")


@cache
def _undisturbed(world_size: int) -> Play:
    return _play((), (False,) * world_size)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(min_size=_CHOICES, max_size=_CHOICES), st.lists(st.booleans(), min_size=2, max_size=3))
def test_every_exchange_counts_once_whatever_breaks(choices: bytes, local: list[bool]) -> None:
    """Over streams, local sockets, and both in one job."""
    play, expected = _play(choices, tuple(local)), _undisturbed(len(local))
    assert play.owned() == expected.owned()
    assert play.has_ended_well
    for rank, as_expected in zip(play.ranks, expected.ranks, strict=True):
        assert rank.results == as_expected.results
