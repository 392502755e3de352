"""The one judgement of stalls, mismatches and losses, and what environments announce."""

from __future__ import annotations

import pytest

from bnlayer import MismatchError, PeerLostError, StallError
from bnlayer.agreement import Peer, check_agreement
from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.environment import announced


def sums(layer: str = "bn3", step: int = 120, channels: int = 256, grid: int = 255) -> Call:
    """A forward contribution."""
    signature = LayerSignature(channels, "float32", 0.99, 1e-3, grid=grid)
    return Call(Operation.SUMS, ExchangeKey(layer, Direction.FORWARD, step), signature)


def reduction(number: int, op: str = "sum") -> Call:
    """A plain reduction."""
    return Call(Operation.REDUCE, ExchangeKey(None, None, number), PlainSignature(op, ("float32(3,)",)))


def test_equal_calls_can_be_answered() -> None:
    """Nobody is to blame, also when no rank has made a call."""
    assert check_agreement({0: sums(), 1: sums()}, {}, {}) is None
    assert check_agreement({}, {}, {}) is None
    assert check_agreement({}, {1: ""}, {}) is None


def test_a_mismatch_names_rank_host_pid_layer_step_and_both_values() -> None:
    """The text of the design, and the attributes."""
    calls = {rank: sums(channels=128 if rank == 2 else 256) for rank in range(4)}
    verdict = check_agreement(calls, {}, {2: Peer(2, "n2", 4711)})
    assert verdict is not None
    error = verdict.error(calls[0])
    assert isinstance(error, MismatchError)
    assert str(error) == (
        "layer 'bn3' (forward, step 120): channels: rank 2 (host n2, pid 4711) sent 128, ranks 0, 1, 3 sent 256. "
        "All ranks must build the same model and make the same calls; check the configuration of rank 2."
    )
    assert (error.ranks, error.layer, error.step) == ((2,), "bn3", 120)


def test_a_tie_blames_both_sides() -> None:
    """With two ranks nobody is in the minority; grids are shown as their fingerprints."""
    verdict = check_agreement({0: sums(grid=1), 1: sums(grid=2)}, {}, {})
    assert verdict is not None
    assert verdict.ranks == (0, 1)
    assert "grid: rank 0 sent 0000000000000001, rank 1 sent 0000000000000002." in verdict.text
    assert verdict.text.endswith("compare their code.")


def test_a_probe_against_sums_and_other_attempts_are_mismatches() -> None:
    """At one place, but in different rounds of it."""
    probe = Call(Operation.PROBE, sums().key, sums().signature)
    verdict = check_agreement({0: sums(), 1: probe, 2: sums()}, {}, {})
    assert verdict is not None
    assert "operation: rank 1 sent probe, ranks 0, 2 sent sums" in verdict.text
    verdict = check_agreement({0: sums(), 1: Call(Operation.SUMS, sums().key, sums().signature, 2)}, {}, {})
    assert verdict is not None
    assert verdict.kind is MismatchError
    assert "attempt: rank 0 sent 0, rank 1 sent 2" in verdict.text


def test_plain_operations_are_compared_too() -> None:
    """Another operation, or another number of it."""
    verdict = check_agreement({0: reduction(3), 1: reduction(3, "max"), 2: reduction(3)}, {}, {})
    assert verdict is not None
    assert verdict.text.startswith("a plain operation (number 3): op: rank 1 sent max, ranks 0, 2 sent sum.")
    verdict = check_agreement({0: reduction(3), 1: sums()}, {}, {})
    assert verdict is not None
    assert verdict.kind is StallError
    assert "rank 0 waits in allreduce (number 3); rank 1 waits in layer 'bn3' (forward, step 120)" in verdict.text
    barrier = Call(Operation.BARRIER, ExchangeKey(None, None, 3), PlainSignature())
    verdict = check_agreement({0: reduction(3), 1: barrier}, {}, {})
    assert verdict is not None
    assert verdict.text.startswith(
        "a plain operation (number 3): operation: rank 0 sent allreduce, rank 1 sent barrier. All ranks"
    )
    many = tuple(f"float32[{n}]" for n in range(1000))
    other = Call(Operation.REDUCE, ExchangeKey(None, None, 3), PlainSignature("sum", many))
    verdict = check_agreement({0: reduction(3), 1: other}, {}, {})
    assert verdict is not None
    assert len(verdict.text) < 700


def test_different_keys_are_a_stall_and_name_the_minority() -> None:
    """Who waits where."""
    calls = {0: sums("a"), 1: sums("b"), 2: sums("a")}
    verdict = check_agreement(calls, {}, {})
    assert verdict is not None
    error = verdict.error(calls[1])
    assert isinstance(error, StallError)
    assert "ranks 0, 2 wait in layer 'a' (forward, step 120); rank 1 waits in layer 'b'" in str(error)
    assert (error.ranks, error.layer, error.step) == ((1,), "b", 120)


def test_a_clean_leave_stalls_those_that_wait() -> None:
    """An early return on one rank."""
    verdict = check_agreement({0: sums()}, {1: "", 2: ""}, {1: Peer(1, "n", 7)})
    assert verdict is not None
    assert verdict.kind is StallError
    assert verdict.text.startswith("rank 1 (host n, pid 7), rank 2 left the job, while rank 0 waits in layer 'bn3'")
    assert verdict.ranks == (1, 2)


def test_a_failed_rank_is_lost() -> None:
    """A failure beats a clean leave; who was not waiting is told without a place."""
    verdict = check_agreement({0: sums()}, {1: "failed with ValueError: x", 2: ""}, {})
    assert verdict is not None
    error = verdict.error(None)
    assert isinstance(error, PeerLostError)
    assert str(error) == "rank 1 failed with ValueError: x. rank 0 waits in layer 'bn3' (forward, step 120)."
    assert (error.ranks, error.layer, error.step) == ((1,), None, None)
    alone = check_agreement({}, {1: "crashed"}, {})
    assert alone is not None
    assert alone.text == "rank 1 crashed. nobody waited for it."


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, []),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, [("OMPI_COMM_WORLD_RANK", 1, 3)]),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, [("PMI_RANK", 0, 2)]),
        ({"RANK": "3", "WORLD_SIZE": "4"}, [("RANK", 3, 4)]),
        ({"RANK": "3"}, []),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, []),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "4294967291x"}, []),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"}, [("SLURM_PROCID", 0, 2)]),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "0"},
            [("RANK", 1, 2), ("SLURM_PROCID", 0, 1)],
        ),
    ],
)
def test_launchers_are_read_strongest_first(environ: dict[str, str], expected: list[tuple[str, int, int]]) -> None:
    """Inside salloc a plain process has SLURM variables, but is no step."""
    assert [(a.variable, a.rank, a.world_size) for a in announced(environ)] == expected


@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "x")])
def test_invalid_variables_are_named(rank: str, size: str) -> None:
    """Not a number, or a rank outside its world."""
    with pytest.raises(ValueError, match="torchrun: expected 0 <= RANK < WORLD_SIZE, received"):
        announced({"RANK": rank, "WORLD_SIZE": size})
