"""Mutated messages: the service refuses them in documented words, and the job beside them has its bits."""

import os

import pytest

from support.fault.mutated import attack
from support.fault.seed import SEED

# Caches and the allocator's own rounding; what one message in a hundred left behind would be more.
_GROWTH = 20 * 2**20


@pytest.mark.parametrize(
    "messages", [3_000, pytest.param(int(os.environ.get("MESSAGES", "100000")), marks=pytest.mark.soak)]
)
def test_mutated_messages_are_refused_and_leave_nothing(messages: int) -> None:
    """`MESSAGES=1000000 make test-long` sends a million."""
    outcome = attack(SEED, messages)
    print(
        f"{outcome.messages} messages: {dict(outcome.codes)}, resident {[size >> 20 for size in outcome.resident]} MiB"
    )
    assert outcome.faults == []
    assert {"INVALID_ARGUMENT", "FAILED_PRECONDITION"} <= outcome.codes.keys()
    assert outcome.resident[-1] - outcome.resident[1] < _GROWTH
