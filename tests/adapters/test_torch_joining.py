"""Joining under torchrun: the process group as a transport, and a service without an address."""

from __future__ import annotations

import json
from pathlib import Path

from support.adapters import torchrun


def test_each_transport_under_torchrun(tmp_path: Path) -> None:
    """Two ranks train in the same world whatever carries it; before init_process_group there is no such transport."""
    ended = torchrun(2, Path(__file__).with_name("torch_join_rank.py"), tmp_path)
    assert ended.code == 0, ended.out + ended.err
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    for rank, seen in enumerate(ranks):
        assert "call torch.distributed.init_process_group() before bnworker.join()" in seen["too early"]
        for asked, joined in (("torch", "torch"), ("None", "torch"), ("service", "service")):
            expected = f"World(rank={rank}, world_size=2, transport={joined!r})"
            assert seen[asked] == [joined, expected, 3.0, ranks[0]["torch"][3]]
    assert "bnserver" not in ended.out + ended.err
