"""Elastic jobs on two hosts, network namespaces: a host is lost as a whole, or cut off, and the bits don't show it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import elastic, elastic_hosts
from support.elastic import POWER, WAY
from support.hosts import Host, hosts, needs_nft, needs_root
from support.killing import KILLS

pytestmark = [pytest.mark.rpc, pytest.mark.fault, pytest.mark.timeout(600), needs_root, needs_nft]


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Host]]:
    """The first one stays, with the service."""
    with hosts("one", "two") as made:
        yield made


_SOAK = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("what", "count"),
    [
        pytest.param(WAY, 1),
        *(pytest.param(what, KILLS, marks=_SOAK) for what in (POWER, WAY)),
    ],
)
def test_a_host_is_lost(what: str, count: int, pair: list[Host], tmp_path: Path) -> None:
    """Anywhere in a step: the others go on without it, and with it once it is back; nothing counts twice or never.

    What was cut off and lives on makes no step meanwhile: a generation has a rank once, and those that the others form
    have none of its ranks.
    """
    plan, steps = elastic_hosts.losses(count, seed=count)
    alone = elastic.run(tmp_path / "alone", 1, f"1:{elastic.RANKS}", steps, [])
    story = elastic_hosts.run(tmp_path / "parts", pair, what, plan, steps)
    print(f"from each loss to the next step: {', '.join(f'{gap:.2f}' for gap in story.gaps)} s")
    assert story.codes == [0, 0], story.stranded
    assert {line["ends"] for line in story.lines if "ends" in line} == alone.digests
    generations = [line for line in story.lines if "generation" in line]
    for number in {line["generation"] for line in generations}:
        members = [line for line in generations if line["generation"] == number]
        assert sorted(line["rank"] for line in members) == list(range(members[0]["ranks"])), members
        if number in story.without:
            assert {line["slot"] for line in members} == {0, 1}
    if what == WAY:
        assert (
            story.stranded.count("(CUT_OFF: no heartbeat was answered for 2 s; this host is cut off, or the service ")
            > 0
        )
        assert "cancelled" not in story.stranded.lower()
