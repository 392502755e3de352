"""What tests of several rooms need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bnlayer.kernels import choice, kernels


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test choose the kernels anew; afterwards they are what they were."""
    caches = kernels, choice.chosen, choice.threads
    for cached in caches:
        cached.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()
