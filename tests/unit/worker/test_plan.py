"""Which transport and which rank: arguments, variables, launchers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bnproto.credentials import NONE, Credentials
from bnworker.own_service import first_host
from bnworker.plan import Plan, plan
from support import environments as started

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "0"}
OURS = {"BNLAYER_RANK": "1", "BNLAYER_WORLD_SIZE": "2"}
ADDRESS = {"BNLAYER_ADDRESS": "h:1"}
SERVICE = {"BNLAYER_ADDRESS": "127.0.0.1:7000", "BNLAYER_JOB": "j"}


@pytest.mark.parametrize(
    ("environ", "arguments", "expected"),
    [
        ({}, {}, ("alone", 0, 1)),
        (OPEN_MPI, {}, ("mpi", 1, 2)),
        (MPICH, {}, ("mpi", 1, 2)),
        (MPICH | SLURM, {}, ("mpi", 1, 2)),
        (MPICH | TORCHRUN, {}, ("mpi", 1, 2)),
        (OURS | MPICH, {}, ("mpi", 1, 2)),
        (SERVICE | OURS, {}, ("service", 1, 2)),
        (SERVICE | MPICH, {}, ("service", 1, 2)),
        (SERVICE | TORCHRUN, {}, ("service", 2, 4)),
        (SERVICE | TORCHRUN | SLURM, {}, ("service", 2, 4)),
        (SERVICE | SLURM, {}, ("service", 3, 8)),
        (SERVICE | SLURM | OURS, {}, ("service", 1, 2)),
        (SERVICE | OURS | {"BNLAYER_TRANSPORT": "alone"}, {}, ("alone", 0, 1)),
        (SERVICE | OURS | {"BNLAYER_TRANSPORT": "alone"}, {"transport": "service"}, ("service", 1, 2)),
        (SERVICE | MPICH | {"BNLAYER_TRANSPORT": "mpi"}, {}, ("mpi", 1, 2)),
        (SLURM, {"transport": "mpi"}, ("mpi", 3, 8)),
        ({}, {"transport": "mpi"}, ("mpi", None, None)),
        (SERVICE | OURS, {"rank": 5, "world_size": 6}, ("service", 5, 6)),
        (SERVICE | OURS | OPEN_MPI, {"rank": 0}, ("service", 0, 2)),
        (SERVICE, {"rank": 0, "world_size": 1}, ("service", 0, 1)),
        ({}, {"address": "h:1", "job": "j", "rank": 0, "world_size": 3}, ("service", 0, 3)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, {}, ("alone", 0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, {}, ("alone", 0, 1)),
        (SERVICE | {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "1"}, {}, ("service", 0, 4)),
        (SERVICE | {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, {}, ("service", 3, 4)),  # a batch script is process 0
    ],
)
def test_the_choice(environ: dict[str, str], arguments: dict[str, Any], expected: tuple[str, Any, Any]) -> None:
    """Arguments beat BNLAYER_*, which beat MPI's variables, which beat torchrun's, which beat Slurm's."""
    chosen = plan(environ, **arguments)
    assert (chosen.transport, chosen.rank, chosen.world_size) == expected


def test_ipv6_addresses_are_in_brackets() -> None:
    """Nothing else says where the host ends."""
    where = {"job": "j", "rank": 0, "world_size": 1}
    assert plan({}, address="[::1]:7000", **where).address == "[::1]:7000"  # type: ignore[arg-type]  # mixed values
    with pytest.raises(ValueError, match=r"received '::1:7000'\. An IPv6 host stands in brackets: \[::1\]:7000\.$"):
        plan({}, address="::1:7000", **where)  # type: ignore[arg-type]  # mixed values


@pytest.mark.parametrize(
    ("environ", "arguments", "text"),
    [
        (
            OURS | {"PMI_RANK": "0", "PMI_SIZE": "2"},
            {},
            (
                "Two launchers disagree: BNLAYER_RANK=1 of 2, but PMI_RANK=0 of 2 (MPICH's mpiexec). "
                "Start the ranks with one of them, or give rank= and world_size= to join()."
            ),
        ),
        (
            OURS | SERVICE | TORCHRUN,
            {},
            (
                "Two launchers disagree: BNLAYER_RANK=1 of 2, but RANK=2 of 4 (torchrun). "
                "Start the ranks with one of them, or give rank= and world_size= to join()."
            ),
        ),
        (
            TORCHRUN,
            {},
            (
                "torchrun announces 4 ranks (this is rank 2), but not how they reach each other: give address= (or "
                "BNLAYER_ADDRESS) of a statistics service, or transport='mpi'; transport='alone' trains each rank for "
                "itself."
            ),
        ),
        (
            SLURM,
            {},
            (
                "Slurm's srun announces 8 ranks (this is rank 3), but not how they reach each other: give address= (or "
                "BNLAYER_ADDRESS) of a statistics service, or transport='mpi'; transport='alone' trains each rank for "
                "itself."
            ),
        ),
        ({}, {"transport": "nccl"}, "transport=: expected 'alone', 'mpi', 'service' or 'torch', received 'nccl'."),
        (
            {"BNLAYER_TRANSPORT": "grpc"},
            {},
            "BNLAYER_TRANSPORT: expected 'alone', 'mpi', 'service' or 'torch', received 'grpc'.",
        ),
        (
            OURS,
            {"transport": "service"},
            (
                "transport 'service': missing the service's address (address= or BNLAYER_ADDRESS), "
                "the job's name (job= or BNLAYER_JOB)."
            ),
        ),
        (
            SERVICE,
            {},
            (
                "transport 'service': missing this process's rank (rank= or BNLAYER_RANK), "
                "the number of ranks (world_size= or BNLAYER_WORLD_SIZE)."
            ),
        ),
        (
            SERVICE | {"BNLAYER_RANK": "0"},
            {},
            "BNLAYER_RANK is set, but BNLAYER_WORLD_SIZE is not: set both, or neither.",
        ),
        (
            SERVICE | {"BNLAYER_WORLD_SIZE": "2"},
            {},
            "BNLAYER_WORLD_SIZE is set, but BNLAYER_RANK is not: set both, or neither.",
        ),
        (
            SERVICE,
            {"rank": 1},
            (
                "Expected both rank= and world_size=, received rank=1 and world_size=None, "
                "and no launcher announces the other."
            ),
        ),
        (SERVICE, {"rank": 2, "world_size": 2}, "Expected 0 <= rank < world_size, received rank 2 of 2."),
        (
            {},
            {"rank": 1, "world_size": 2},
            (
                "transport 'alone' is a world of one: expected rank 0 of 1, received rank 1 of 2. "
                "Give address= or transport='mpi' for more."
            ),
        ),
    ],
)
def test_what_is_refused(environ: dict[str, str], arguments: dict[str, Any], text: str) -> None:
    """Where guessing would train wrongly, the error names what is missing or contradicts."""
    with pytest.raises(ValueError) as caught:
        plan(environ, **arguments)
    assert str(caught.value) == text


def test_an_initialized_process_group_is_used_where_nothing_else_is_configured() -> None:
    """torch.distributed beats the variables of torchrun; an address, and MPI's variables, beat it."""
    assert plan(TORCHRUN, process_group=True) == Plan(
        "torch", 2, 4, "torch.distributed is initialized; RANK says the rank"
    )
    assert plan({}, process_group=True).transport == "torch"
    assert plan(SERVICE | TORCHRUN, process_group=True).transport == "service"
    assert plan(MPICH, process_group=True).transport == "mpi"


@pytest.mark.parametrize("transport", ["alone", "mpi"])
def test_an_address_needs_the_service(transport: str) -> None:
    """As an argument it was silently ignored; that of the environment may be there for other jobs, and is a note."""
    with pytest.raises(ValueError) as caught:
        plan(MPICH, transport=transport, address="h:1")
    assert str(caught.value) == (
        f"address= is of a statistics service, and transport={transport!r} uses none: give transport='service' to use "
        "the one at h:1, or leave out address=."
    )
    for chosen in (plan(SERVICE, transport=transport), plan(SERVICE | {"BNLAYER_TRANSPORT": transport})):
        assert (chosen.transport, chosen.address) == (transport, None)
        assert " says so, so BNLAYER_ADDRESS=127.0.0.1:7000 is not used" in chosen.reason


def test_an_explicit_rank_resolves_a_conflict() -> None:
    """rank= and world_size= beat launchers that disagree."""
    chosen = plan(SERVICE | OURS | TORCHRUN, rank=3, world_size=4)
    assert (chosen.rank, chosen.reason) == (
        3,
        (
            "the service's address is 127.0.0.1:7000; rank= and world_size= are given, which beats BNLAYER_RANK=1 and "
            "RANK=2"
        ),
    )


def test_the_reason_names_winner_and_losers() -> None:
    """What is logged says which of several launchers was believed."""
    assert plan(MPICH | SLURM).reason == (
        "MPICH's mpiexec started this process; PMI_RANK says the rank, which beats SLURM_PROCID=3"
    )
    assert plan(SLURM, transport="alone").reason == ("transport= says so, although Slurm's srun announces 8 ranks")


def test_credentials_are_for_the_service() -> None:
    """Elsewhere nobody would look at them; a token does not leave this machine in plain text."""
    shown = {"BNLAYER_TOKEN_FILE": "token", "BNLAYER_TLS_CA": "ca.pem"}
    assert plan(SERVICE | OURS | shown).credentials == Credentials(token_file=Path("token"), ca=Path("ca.pem"))
    assert plan(SERVICE | OURS, token="t").credentials == Credentials("t")
    for environ in ({}, MPICH):
        assert plan(environ | shown, token="t").credentials == NONE
    with pytest.raises(ValueError, match="The token would cross the network to trainer:1 in plain text"):
        plan(SERVICE | OURS, address="trainer:1", token="t")
    with pytest.raises(ValueError, match="BNLAYER_TLS_KEY is set, but BNLAYER_TLS_CERT is not"):
        plan(SERVICE | OURS | {"BNLAYER_TLS_KEY": "key.pem"})


def test_a_process_group_that_is_initialized_beats_a_service_of_its_own() -> None:
    """Under torchrun and srun the ranks reach each other already; what is given explicitly still counts."""
    for environ in (started.TORCHRUN, started.SRUN, {}):
        chosen = plan(environ, process_group=True)
        assert (chosen.transport, chosen.own) == ("torch", None)
        assert chosen.reason.startswith("torch.distributed is initialized; ")
    assert plan(started.TORCHRUN, process_group=True, transport="service").own is not None
    assert plan(started.TORCHRUN | ADDRESS, process_group=True).address == "h:1"


@pytest.mark.parametrize(
    ("environ", "what"),
    [
        ({"BNLAYER_TOKEN_FILE": "t"}, "a token"),
        ({"BNLAYER_TLS_CA": "ca.pem"}, "BNLAYER_TLS_CA"),
        ({"BNLAYER_TOKEN": "t", "BNLAYER_TLS_CA": "ca.pem"}, "a token and BNLAYER_TLS_CA"),
    ],
)
@pytest.mark.parametrize(
    "launcher", [started.TORCHRUN, started.SRUN | {"BNLAYER_INSECURE": "1"}], ids=["torchrun", "srun"]
)
def test_a_service_of_its_own_has_no_credentials(launcher: dict[str, str], environ: dict[str, str], what: str) -> None:
    """Nobody shall believe that it is encrypted, or that it asks who joins."""
    with pytest.raises(ValueError) as caught:
        plan(launcher | environ)
    assert str(caught.value) == (
        f"The job starts its own service, which has neither encryption nor tokens yet; received {what}. Start one that "
        "has with bnlayer serve, and give its address; or take the credentials out of the environment."
    )
    shown = plan(launcher | environ | {"BNLAYER_ADDRESS": "127.0.0.1:1", "BNLAYER_JOB": "j"}).credentials
    assert shown.has_token or shown.ca is not None


def test_plain_text_is_permitted_by_the_same_option_everywhere() -> None:
    """BNLAYER_INSECURE is 0 or 1."""
    with pytest.raises(ValueError, match="BNLAYER_INSECURE: expected 0 or 1, received 'yes'"):
        plan(started.SRUN | {"BNLAYER_INSECURE": "yes"})
    with pytest.raises(ValueError, match="in plain text and without a check of who joins: set BNLAYER_INSECURE=1"):
        plan(started.SRUN | {"BNLAYER_INSECURE": "0"})


def test_a_plan_for_the_service_holds_all_of_it() -> None:
    """Arguments and variables come together."""
    assert plan(OURS | {"BNLAYER_JOB": "j"}, address="h:1", job="k") == Plan(
        "service",
        1,
        2,
        "the service's address is h:1; BNLAYER_RANK says the rank; job= is given, which beats BNLAYER_JOB=j",
        "h:1",
        "k",
    )


@pytest.mark.parametrize(("reported", "expected"), [(None, True), ("", True), ("1", True), ("0", False)])
def test_the_local_socket_can_be_turned_off(reported: str | None, expected: bool) -> None:
    """BNLAYER_LOCAL_SOCKET=0 keeps a rank on its stream."""
    environ = SERVICE | OURS | ({} if reported is None else {"BNLAYER_LOCAL_SOCKET": reported})
    assert plan(environ).local_socket is expected


def test_the_local_socket_is_on_or_off() -> None:
    """Anything else is a mistake in a job's script."""
    with pytest.raises(ValueError, match="BNLAYER_LOCAL_SOCKET: expected 0 or 1, received 'no'"):
        plan(SERVICE | OURS | {"BNLAYER_LOCAL_SOCKET": "no"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[01-03,7],m1", "n01"), ("rack2-[9,11]", "rack2-9"), ("a[1-2]-ib,b", "a1-ib")],
)
def test_the_first_host_of_a_step(nodes: str, first: str) -> None:
    """Lists as Slurm abbreviates them; leading zeros belong to the name."""
    assert first_host(nodes) == first


def test_what_arguments_beat_is_logged() -> None:
    """Each variable that says something else."""
    environ = SERVICE | OURS | {"BNLAYER_TRANSPORT": "mpi"}
    assert plan(environ, address="h:1", job="k", rank=0).reason == (
        "the service's address is h:1, which beats BNLAYER_TRANSPORT=mpi and BNLAYER_ADDRESS=127.0.0.1:7000; rank= is "
        "given, which beats BNLAYER_RANK=1; job= is given, which beats BNLAYER_JOB=j"
    )
