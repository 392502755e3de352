"""The ranks of a generation, as those see them that wait for the next one."""

import pytest

from bnlayer.agreement import Peer
from bnserver.core.members import Member, Membership


@pytest.mark.parametrize(("lease", "count"), [(4.0, 2), (6.0, 3), (0.0, 3)])
def test_ranks_that_were_heard_lately(lease: float, count: int) -> None:
    """Not half a lease before the latest; all of those that are connected, where there is no lease."""
    members = Membership(4)
    for rank, seen in enumerate((7.5, 10.0, 9.0, 10.0)):
        member = Member(Peer(rank), timeout=9.0, join_deadline=9.0)
        member.connect(rank, 0, seen)
        members.add(member)
    members.here[3].disconnect(1.0, 10.0)
    assert members.heard_lately(lease) == count
    assert Membership(4).heard_lately(lease) == 0
