"""Elastic jobs over MPI, under Open MPI's ULFM: ranks are lost, and the others go on with the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from support import mpi
from support.elastic import BETWEEN, PROGRAM, RANKS, SAVED, Kill, Run, planned
from support.killing import KILLS
from support.training import Trained, same_result, trained

pytestmark = [pytest.mark.mpi, pytest.mark.fault]

ULFM = ("--with-ft", "ulfm")
AT = 4  # the step of surviving_rank.py at which something happens
BEGUN = [(1, 3, 0)] * 3  # its first generation, as its ranks see it
KILLED_TRAINING = Path(__file__).with_name("killed_training.py")
SURVIVING = Path(__file__).with_name("surviving_rank.py")


def lines(text: str) -> list[dict[str, object]]:
    """What ranks printed as JSON; two may share a line."""
    items, decoder = [], json.JSONDecoder()
    while (start := text.find("{")) >= 0:
        item, end = decoder.raw_decode(text[start:])
        items.append(item)
        text = text[start + end :]
    return items


def run(folder: Path, ranks: int, steps: int, kills: list[Kill]) -> Run:
    """A job of `support/elastic_rank.py`, whose ranks kill themselves as planned."""
    folder.mkdir(parents=True)
    environ = {"BNLAYER_ELASTIC": f"1:{ranks}", "BNLAYER_TEST_KILLS": json.dumps(kills)}
    ended = mpi.run(ranks, PROGRAM, folder, str(steps), "1", environ=environ, options=ULFM, limit_s=300)
    marks = sorted(folder.glob("kill-*"), key=lambda mark: int(mark.name.removeprefix("kill-")))
    killed = [mark.read_text(encoding="utf-8").split() for mark in marks]
    return Run(ended.code, lines(ended.out), ended.err, [(float(when), int(number)) for when, number in killed])


def survive(way: str, ranks: int = 3) -> tuple[mpi.Ended, list[dict[str, object]]]:
    """A job in which rank 1, or 0, does as `surviving_rank.py` says."""
    ended = mpi.run(ranks, SURVIVING, way, options=ULFM)
    return ended, lines(ended.out)


def numbers(said: list[dict[str, object]]) -> list[tuple[object, object, object]]:
    """The generations that the ranks saw, how many they were, and where they went on."""
    return sorted((line["generation"], line["ranks"], line["step"]) for line in said if "generation" in line)


def ends(said: list[dict[str, object]]) -> set[object]:
    """The bits with which the ranks ended."""
    return {line["ends"] for line in said if "ends" in line}


@pytest.fixture(scope="module")
def undisturbed() -> set[object]:
    """Those with which a job ends to which nothing happens."""
    ended, said = survive("nothing")
    assert ended.code == 0, ended.err
    assert numbers(said) == BEGUN
    assert len(ends(said)) == 1
    return ends(said)


def test_ranks_are_killed(tmp_path: Path) -> None:
    """With -9: one in the middle of a step, and rank 0 between the last exchange before a commit and the commit."""
    kills: list[Kill] = [(2, 7, BETWEEN), (0, 15, SAVED)]
    alone = run(tmp_path / "alone", 1, 18, [])
    parts = run(tmp_path / "parts", RANKS, 18, kills)
    assert (alone.code, parts.code) == (0, 0), parts.err
    assert len(parts.killed) == 2
    assert parts.digests == alone.digests
    assert len(alone.digests) == 1
    assert [sum("ends" in line for line in job.lines) for job in (alone, parts)] == [1, 2]
    seen = numbers(parts.lines)
    assert [(number, ranks) for number, ranks, _ in seen] == [(1, 4)] * 4 + [(2, 3)] * 3 + [(3, 2)] * 2
    assert {step for number, _, step in seen if number == 2} == {7}
    assert {step for number, _, step in seen if number == 3} == {15}
    assert "rank 2 (host " in parts.err
    assert "those that are left join anew" in parts.err


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_ranks_are_killed(tmp_path: Path) -> None:
    """At a random point of a random step, one or two in each job."""
    gaps: list[float] = []
    number = 0
    alone = {steps: run(tmp_path / f"alone-{steps}", 1, steps, []).digests for steps in (12, 18)}
    while len(gaps) < KILLS:
        plan, steps = planned(1 + number % 2, seed=number)
        victims = dict.fromkeys(victim for victim, _, _ in plan)
        plan = [kill for kill, victim in zip(plan, victims, strict=False) if kill[0] == victim]
        done = run(tmp_path / str(number), RANKS, steps, plan)
        assert done.code == 0, (plan, done.err)
        assert len(done.killed) == len(plan)
        assert done.digests == alone[steps], plan
        print(f"{plan}: {', '.join(f'{gap:.2f}' for gap in done.gaps)} s to the next step", flush=True)
        gaps += done.gaps
        number += 1
    print(f"{len(gaps)} kills: median {sorted(gaps)[len(gaps) // 2]:.2f}, longest {max(gaps):.2f} s")


def test_fewer_are_left_than_needed() -> None:
    """All that are left say so, and the job fails."""
    ended, said = survive("too-few")
    assert ended.code == 1
    assert ended.err.count(") was lost: 2 ranks are left, and the job needs 3 (MIN). Over MPI none can join") == 2
    assert "PeerLostError: rank 1 (host " in ended.err
    assert ends(said) == set()


def test_a_rank_that_fails_is_lost(undisturbed: set[object]) -> None:
    """By an exception: the others are told which one, and go on; it ends."""
    ended, said = survive("fails")
    assert ended.code == 0, ended.err
    assert ended.err.count(") failed with ValueError: no such file. ") >= 2
    assert numbers(said) == BEGUN + [(2, 2, AT)] * 2
    assert ends(said) == undisturbed


@pytest.mark.parametrize(
    ("way", "generations"),
    [
        ("falls-behind", [(2, 3, AT + 1)] * 3),  # the exchange completed on the others, which have saved the step
        ("cut-at-the-end", [(2, 3, 5)] * 3),  # the last admission did: they must not finish without it
        ("unspecific", [(2, 3, AT)] * 3),  # by an error that does not say that the communicator was revoked
    ],
)
def test_an_exchange_that_fails_on_some(
    way: str, generations: list[tuple[int, int, int]], undisturbed: set[object]
) -> None:
    """All go on from the state of the rank that is ahead, where it completed on others; and none of them alone."""
    ended, said = survive(way)
    assert ended.code == 0, ended.err
    assert numbers(said) == BEGUN + generations
    assert ends(said) == undisturbed


@pytest.mark.parametrize("way", ["freezes", "exits"])
def test_a_rank_that_is_not_known_to_be_dead_ends_the_job(way: str) -> None:
    """A frozen one, or one that ended by `os._exit`: it is named at the deadline, and the whole job ends with it."""
    ended, _ = survive(way)
    assert ended.code != 0
    assert "PeerLostError: rank 1 (host " in ended.err
    assert ") did not come within 6 s (last seen completing layer 'bn'" in ended.err
    assert "ends the whole MPI job" in ended.err


def test_training_goes_on(tmp_path: Path) -> None:
    """`mpirun --with-ft ulfm bnlayer train --elastic`: rank 0 is killed, and the other has one process's result."""
    options = ("--dtype=float64", "--steps=20", "--batch-size=37", "--hidden=24,10", "--seed=3")
    alone = trained(tmp_path / "alone", "--transport=none", *options)
    out = tmp_path / "parts"
    files = (f"--summary={out}/summary.json", f"--save={out}/saved.safetensors")
    ended = mpi.run(2, KILLED_TRAINING, "--elastic=1:2", *options, *files, options=ULFM)
    assert ended.code == 0, ended.err
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["transport"], summary["world_size"]) == ("mpi", 1)
    assert "resumed after step 10" in ended.out + ended.err
    same_result(alone, Trained(summary, load_file(out / "saved.safetensors"), ended.out, ended.err))


@pytest.mark.parametrize(
    ("way", "ranks", "text"),
    [
        ("limits", 3, "MismatchError: The ranks disagree on how many they may be (MIN:MAX): 2:3, 2:4."),
        ("nothing", 4, "ValueError: elastic(): the MPI job has 4 ranks, and may have 2:3 (MIN:MAX)."),
    ],
)
def test_limits_that_do_not_fit(way: str, ranks: int, text: str) -> None:
    """The same error on every rank."""
    ended, _ = survive(way, ranks)
    assert ended.code != 0
    assert ended.err.count(text) == ranks
