"""The contract of every transport, over a gloo process group under torchrun with one to three ranks."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.adapters import torchrun
from support.contract import names
from support.contract.timing import FAILURE_WITHIN_S, Watch, latency

Outcomes = list[dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcomes]:
    """What every rank saw in every body, by the number of ranks; one start of torchrun for each number."""
    seen = {}
    for world_size in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks-{world_size}-")
        ended = torchrun(world_size, Path(__file__).with_name("torch_contract_rank.py"), folder)
        assert ended.code == 0, ended.out + ended.err
        files = [folder / f"{rank}.json" for rank in range(world_size)]
        seen[world_size] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return seen


@pytest.mark.parametrize(
    ("world_size", "name"), [(world_size, name) for world_size in (1, 2, 3) for name in names("torch", world_size)]
)
def test_contract(outcomes: dict[int, Outcomes], world_size: int, name: str) -> None:
    """Each body passes on every rank, all ranks see the same, and a disagreement is told within a second."""
    ranks = [rank[name] for rank in outcomes[world_size]]
    for number, rank in enumerate(ranks):
        assert "failed" not in rank, f"rank {number}: {rank['failed']}"
    texts = [rank["saw"] for rank in ranks if rank["saw"] is not None]
    assert all(saw == texts[0] for saw in texts)
    if name.startswith("disagree_"):
        assert latency([Watch(rank["contributed_at"], rank["failed_at"]) for rank in ranks]) <= FAILURE_WITHIN_S
