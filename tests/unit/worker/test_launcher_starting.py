"""What is decided before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from bnworker.launcher.remote import Remote, launch
from bnworker.launcher.starting import Job, LaunchError, Several, check, environment, service_command
from bnworker.limits import Limits
from bnworker.own_service import daemon_environment

FOLDER = Path("/tmp/launch")


@pytest.mark.parametrize(
    ("job", "text"),
    [
        ({"command": (), "ranks": 1}, "expected a command after --, received nothing; e.g. bnlayer launch -n 2"),
        ({"command": ("x",), "ranks": 0}, "expected at least 1 rank, received 0."),
        ({"command": ("x",), "ranks": 1, "transport": "smoke"}, "expected transport service, mpi or alone"),
        (
            {"command": ("x",), "ranks": 1, "transport": "mpi", "address": "h:1"},
            "an address is for transport service, received transport mpi.",
        ),
        (
            {"command": ("x",), "ranks": 2, "transport": "mpi", "elastic": Limits(1, 2)},
            "--elastic needs the statistics service, received transport mpi: there the loss of a rank ends the job.",
        ),
        (
            {"command": ("x",), "ranks": 1, "elastic": Limits(2, 4)},
            "--elastic 2:4: expected 2 to 4 ranks to start with, received 1.",
        ),
        (
            {"command": ("x",), "ranks": 5, "address": "h:1", "elastic": Limits(2, 4)},
            "--elastic 2:4: expected 1 to 4 ranks to start with, received 5.",
        ),
        ({"command": ("x",), "ranks": 1, "elastic": Limits(1, 4), "max_restarts": -1}, "--max-restarts: expected 0 or"),
        ({"command": ("x",), "ranks": 1, "grace_s": -1.0}, "--grace: expected a number of seconds, 0 or more"),
        ({"command": ("x",), "ranks": 1, "wait_s": float("nan")}, "--wait: expected a number of seconds, 0 or more"),
    ],
)
def test_jobs_that_make_no_sense(job: dict[str, object], text: str) -> None:
    """The user is told what was expected; the code is that of wrong usage."""
    with pytest.raises(LaunchError) as raised:
        Job(**job)  # type: ignore[arg-type]  # the table holds each argument's wrong values
    assert str(raised.value).startswith(text)
    assert raised.value.code == 2


def test_the_ranks_environment() -> None:
    """Every rank finds its job, and what an outer launcher announced is gone."""
    outer = {"PATH": "/bin", "PMI_RANK": "0", "PMI_SIZE": "1", "SLURM_PROCID": "0", "BNLAYER_ADDRESS": "elsewhere:1"}
    inner = environment(Job(("x",), 2, name="mine"), FOLDER, "127.0.0.1:5", outer)
    assert "PMI_RANK" not in inner
    assert inner | {"PATH": "/bin"} == inner
    assert {name: value for name, value in inner.items() if name.startswith("BNLAYER_")} == {
        "BNLAYER_LAUNCH_DIR": "/tmp/launch",
        "BNLAYER_TRANSPORT": "service",
        "BNLAYER_WORLD_SIZE": "2",
        "BNLAYER_JOB": "mine",
        "BNLAYER_ADDRESS": "127.0.0.1:5",
    }


def test_the_ranks_of_an_elastic_job() -> None:
    """They know its limits; what an outer launcher said of its own is gone."""
    outer = {"BNLAYER_ELASTIC": "1:9", "BNLAYER_RESTART_COUNT": "3"}
    assert Job(("x",), 4, elastic=Limits(2, 4)).world_size == 4  # it may begin with the most
    inner = environment(Job(("x",), 2, elastic=Limits(2, 4)), FOLDER, "127.0.0.1:5", outer)
    assert inner["BNLAYER_ELASTIC"] == "2:4"
    assert not {"BNLAYER_ELASTIC", "BNLAYER_RESTART_COUNT"} & environment(Job(("x",), 2), FOLDER, None, outer).keys()
    assert "BNLAYER_RESTART_COUNT" not in inner


def test_the_service_of_an_elastic_job_misses_a_lost_host_earlier() -> None:
    """So that another step is made within the 5 s that are everybody's lease."""
    lease = ["--lease", "4"]
    assert service_command(Job(("x",), 2, elastic=Limits(2, 4)), None)[-2:] == lease
    assert "--lease" not in service_command(Job(("x",), 2), None)


def test_a_job_without_a_name_gets_a_fresh_one() -> None:
    """Two launches against one service are two jobs."""
    names = {environment(Job(("x",), 1), FOLDER, None, {})["BNLAYER_JOB"] for _ in range(10)}
    assert len(names) == 10


def test_an_mpi_job_has_no_address() -> None:
    """An address in the environment would make the ranks choose the service."""
    inner = environment(Job(("x",), 1, "mpi"), FOLDER, None, {"BNLAYER_ADDRESS": "h:1"})
    assert "BNLAYER_ADDRESS" not in inner
    assert inner["BNLAYER_TRANSPORT"] == "mpi"


def test_commands_that_cannot_run(tmp_path: Path) -> None:
    """A shell's codes: 127 not found, 126 not executable."""
    with pytest.raises(LaunchError, match=r"nonesuch: command not found$") as raised:
        check(Job(("nonesuch",), 1), {"PATH": str(tmp_path)})
    assert raised.value.code == 127


@pytest.mark.parametrize(
    ("name", "mode", "text", "reported", "code"),
    [
        ("x.py", 0o644, "", "x.py: command not found; there is a file of this name here: write python x.py", 127),
        ("./x.py", 0o644, "", "./x.py: is there, but not executable: write python x.py", 126),
        (
            "x.py",
            0o755,
            "#!/bin/sh",
            "x.py: command not found; there is a file of this name here: write python x.py",
            127,
        ),
        ("x", 0o755, "#!/bin/sh", "x: command not found; there is a file of this name here: write ./x", 127),
        (
            "./x",
            0o644,
            "",
            "./x: is there, but not executable: write its interpreter in front of it, or chmod +x x and ./x",
            126,
        ),
        (
            "./x.py",
            0o755,
            "import bnworker",
            "./x.py: has no first line that names its interpreter (#!): write python x.py",
            126,
        ),
        (
            "./x",
            0o755,
            "#! /no/such/python -u\n",
            (
                "./x: its first line names the interpreter '/no/such/python', which is not there; correct the line, or "
                "put an interpreter in front, e.g. python x"
            ),
            126,
        ),
        (
            "./x",
            0o755,
            "#!/bin/sh\r\n",
            (
                "./x: its first line names the interpreter '/bin/sh\\r', which is not there; correct the line, or put "
                "an interpreter in front, e.g. python x"
            ),
            126,
        ),
        ("./", 0o755, "", "./: is a folder; expected a program", 126),
        ("./x", 0o755, "#!/bin/sh\n", None, 0),
        ("./x", 0o755, "#!/bin/sh -e\n", None, 0),
    ],
)
def test_files_that_are_no_programs(
    name: str, mode: int, text: str, reported: str | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says "No such file" of a script whose interpreter is missing; here stands what to write instead."""
    monkeypatch.chdir(tmp_path)
    file = Path(name.removeprefix("./") or "other")
    file.write_text(text, encoding="utf-8", newline="")
    file.chmod(mode)
    if reported is None:
        check(Job((name,), 1), {})
        return
    with pytest.raises(LaunchError) as raised:
        check(Job((name,), 1), {"PATH": "/nowhere"})
    assert (str(raised.value), raised.value.code) == (reported, code)


def test_no_mpiexec_inside_mpiexec() -> None:
    """It fails in ways that nobody understands; through the service, ranks may start ranks."""
    environ = {"PATH": "/bin", "PMI_RANK": "0", "PMI_SIZE": "2"}
    with pytest.raises(LaunchError) as raised:
        check(Job(("true",), 2, "mpi"), environ)
    assert str(raised.value) == (
        "MPICH's mpiexec started this process as rank 0; mpiexec cannot run inside mpiexec. "
        "Run the command itself here, without the launcher."
    )
    check(Job(("true",), 2, "service"), environ)


def test_credentials_are_checked_before_anything_is_started() -> None:
    """Each rank would say so, after others were started."""
    environ = {"PATH": "/bin:/usr/bin", "BNLAYER_TOKEN": "t"}
    check(Job(("true",), 1, address="127.0.0.1:1"), environ)
    check(Job(("true",), 1), environ)
    with pytest.raises(LaunchError) as raised:
        check(Job(("true",), 1, address="trainer:1"), environ)
    assert str(raised.value).startswith("The token would cross the network to trainer:1 in plain text.")
    assert raised.value.code == 2


def test_credentials_are_not_for_the_service_of_a_job_on_several_hosts() -> None:
    """It speaks plain text to them, and nobody shall believe otherwise; at an address they count."""
    one = Several(2, 0, "one:7431", 0, 2, insecure=True)
    for name in ("BNLAYER_TOKEN_FILE", "BNLAYER_TLS_CA"):
        environ = {"PATH": "/bin:/usr/bin", name: "x"}
        check(Job(("true",), 1), environ)
        check(Job(("true",), 1, address="127.0.0.1:1", several=one), environ)
        with pytest.raises(LaunchError, match="has neither encryption nor tokens yet; received "):
            check(Job(("true",), 1, several=one), environ)
    check(Job(("true",), 1, several=one), {"PATH": "/bin:/usr/bin", "BNLAYER_INSECURE": "1"})


def test_a_token_appears_in_no_command_line() -> None:
    """Every user of the other hosts can read these."""
    remote = Remote(("true",), (("a", 1),), "a:7431", insecure=True, agent="false")
    with pytest.raises(LaunchError, match="BNLAYER_TOKEN would stand in the command lines on the hosts"):
        launch(remote, {"BNLAYER_TOKEN": "t"})


def test_the_variables_of_a_daemon_are_not_for_a_service_of_the_jobs() -> None:
    """Such as another one's certificates; failpoints are the tests' own."""
    environ = {"BNSERVER_TLS_CERT": "a", "BNSERVER_FAILPOINTS": "b", "BNLAYER_JOB": "c", "HOME": "d"}
    assert daemon_environment(environ) == {name: environ[name] for name in environ if name != "BNSERVER_TLS_CERT"}


def test_an_embedded_service_is_shown_no_credentials(tmp_path: Path) -> None:
    """They are another service's; this one listens on loopback, in plain text."""
    given = {"BNLAYER_TOKEN_FILE": "token", "BNLAYER_TLS_CA": "ca.pem", "BNLAYER_INSECURE": "1"}
    variables = environment(Job(("true",), 1, address="127.0.0.1:1"), tmp_path, "127.0.0.1:1", given)
    assert given.items() <= variables.items()
    assert not given.keys() & environment(Job(("true",), 1), tmp_path, "127.0.0.1:1", given).keys()
