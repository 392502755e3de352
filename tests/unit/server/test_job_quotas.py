"""Quotas in the core: what a job may have, at its limit and one above."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bnlayer.collective import Call, ExchangeKey, Operation
from bnlayer.moving import Moving
from bnserver.core.effects import Enrolled, Failed, Joined, Owned
from bnserver.core.events import Contribute, Leave, Push
from bnserver.core.journal_records import Completed, Ended, LayerSnapshot
from bnserver.core.layers import size
from bnserver.core.quotas import Quotas
from bnserver.core.reasons import Reason
from bnserver.core.service import Service
from support.core import SIGNATURE, STATE, effects_of, enroll, join, layers_with_one
from support.journals import state_of


def test_a_job_too_many_is_refused() -> None:
    """It is no job then; one that is there goes on, and when it is over there is room."""
    service = Service(quotas=Quotas(jobs=1))
    join(service, 1)
    text = (
        "The service refused job 'k': expected at most 1 jobs at a time, received a request for 2; the service's "
        "--max-jobs raises the quota."
    )
    assert join(service, 2, job="k") == [Failed(2, Reason.QUOTA, text)]
    assert service.jobs == ("j",)
    assert [type(effect) for effect in enroll(service, 1)] == [Enrolled]
    effects_of(service, Leave(1, ""))
    assert [type(effect) for effect in join(service, 3, job="k")] == [Joined]


def test_the_ranks_of_a_job_that_is_there_are_no_other_jobs() -> None:
    """At the quota of jobs the second rank joins."""
    service = Service(quotas=Quotas(jobs=1))
    assert [type(effect) for effect in join(service, 1, 2)] == [Joined]


@pytest.mark.parametrize("pushed", [True, False])
def test_a_layer_too_many_is_refused(pushed: bool) -> None:
    """However it comes; a layer that is there is enrolled and pushed as before."""
    service = Service(quotas=Quotas(layers=1))
    join(service, 1)
    enroll(service, 1)
    call = Call(Operation.ENROLL, ExchangeKey("a", None, 1), SIGNATURE)
    assert [type(effect) for effect in effects_of(service, Contribute(1, 1, 2, call, STATE))] == [Enrolled]
    assert [type(effect) for effect in effects_of(service, Push(1, "a", STATE, 1))] == [Owned]
    other = Contribute(1, 1, 3, Call(Operation.ENROLL, ExchangeKey("b", None, 0), SIGNATURE), STATE)
    failed, *_ = effects_of(service, Push(1, "b", STATE, 2) if pushed else other)
    assert isinstance(failed, Failed)
    assert failed.reason is Reason.QUOTA
    assert failed.text == (
        "The service refused what rank 0 (host h, pid 1) sent: expected at most 1 layers of a job, received a request "
        "for 2; the service's --max-layers raises the quota."
    )
    assert set(service.states("j")) == {"a"}


@pytest.mark.parametrize("pushed", [True, False])
def test_all_layers_together_have_a_quota(pushed: bool) -> None:
    """Many layers of many channels were permitted, whatever they hold; what is there is enrolled and pushed on."""
    wide = replace(STATE, moving=Moving(np.zeros(1, np.float64), np.ones(1, np.float64)))
    first, second = size(STATE), size(wide)
    assert (first, second) == (40, 48)
    service = Service(quotas=Quotas(layer_bytes=first + second))
    join(service, 1)
    enroll(service, 1)
    assert [type(effect) for effect in effects_of(service, Push(1, "b", wide, 1))] == [Owned]
    assert [type(effect) for effect in effects_of(service, Push(1, "a", STATE, 2))] == [Owned]
    other = Contribute(1, 1, 2, Call(Operation.ENROLL, ExchangeKey("c", None, 0), SIGNATURE), STATE)
    failed, *_ = effects_of(service, Push(1, "c", STATE, 3) if pushed else other)
    assert isinstance(failed, Failed)
    assert failed.reason is Reason.QUOTA
    assert failed.text == (
        "The service refused what rank 0 (host h, pid 1) sent: expected at most 88 bytes of a job's layers, received a "
        "request for 128; the service's --max-layer-bytes raises the quota."
    )
    assert set(service.states("j")) == {"a", "b"}


def test_a_layer_that_grows_counts() -> None:
    """Rank 0's state replaces the owner's, with more channels; and what it was before does not count any more."""
    layers = layers_with_one()
    layers.keep(LayerSnapshot("a", state_of("float64", 3)))
    assert layers.size == size(state_of("float64", 3)) == 144
    assert layers.size_with("a", STATE) == 144
    assert layers.size_with("b", STATE) == 184
    anew = Call(Operation.ENROLL, ExchangeKey("a", None, 0), replace(SIGNATURE, anew=True))
    layers.completed(Completed(1, anew, state_of("float64", 9)))
    assert layers.size == 3 * 144


def test_a_job_above_the_quota_goes_on() -> None:
    """What it has was permitted when it began: the operator has lowered the quota since."""
    service = Service({"j": [Ended(1), LayerSnapshot("a", STATE)]}, quotas=Quotas(layer_bytes=1))
    join(service, 1)
    assert [type(effect) for effect in enroll(service, 1, 2)] == [Enrolled]
