"""The contract of every transport, over a service with one to four ranks."""

from collections.abc import Iterator

import pytest

from support.contract import names
from support.contract.timing import FAILURE_WITHIN_S, latency
from support.service import daemon, run_threads

pytestmark = pytest.mark.rpc


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of one service for all jobs."""
    with daemon() as at:
        yield at


@pytest.mark.parametrize(
    ("world_size", "name"), [(world_size, name) for world_size in (1, 2, 3, 4) for name in names("service", world_size)]
)
@pytest.mark.parametrize("local_socket", [True, False], ids=["local", "stream"])
def test_contract(address: str, world_size: int, name: str, local_socket: bool) -> None:
    """Each body passes on every rank, all ranks see the same, and a disagreement is told within a second."""
    job = f"{name}-{world_size}-{local_socket}"
    ranks, watches = run_threads(address, job, world_size, name, local_socket=local_socket)
    for saw in ranks:
        if isinstance(saw, BaseException):
            raise saw
    texts = [saw for saw in ranks if saw is not None]
    assert all(saw == texts[0] for saw in texts)
    if name.startswith("disagree_"):
        assert latency(watches) <= FAILURE_WITHIN_S
