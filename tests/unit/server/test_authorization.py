"""Who may do what in which job: the decision, and the file it is made from."""

from __future__ import annotations

import re

import pytest

from bnproto.grpc_options import OBSERVATION_NAME, SERVICE_NAME
from bnproto.v1 import observation_pb2 as observed
from bnproto.v1 import statistics_pb2 as pb
from bnserver.authorization import (
    METHODS,
    Blame,
    Grant,
    Grants,
    Refusal,
    Role,
    TokensError,
    authenticate,
    authorize,
    entry,
    parse,
)

EXCHANGE, HEARTBEAT = f"/{SERVICE_NAME}/Exchange", f"/{SERVICE_NAME}/Heartbeat"
HEALTH = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
UNKNOWN = f"/{SERVICE_NAME}/Forget"

GRANTS = parse("\n".join(entry(role.name.lower(), role.name, ["a-*", "b"], role) for role in Role))


@pytest.mark.parametrize(
    ("role", "allowed"),
    [
        (None, {HEALTH}),
        (Role.READER, {HEALTH, REFLECTION}),
        (Role.WORKER, {HEALTH, REFLECTION, EXCHANGE, HEARTBEAT}),
        (Role.ADMIN, {HEALTH, REFLECTION, EXCHANGE, HEARTBEAT, UNKNOWN}),
    ],
)
def test_the_table(role: Role | None, allowed: set[str]) -> None:
    """Each role may do all that the ones before may; a method that nobody listed is for administrators."""
    shown = None if role is None else f"Bearer {role.name}"
    outcomes = {
        method: authenticate(GRANTS, method, shown) for method in (HEALTH, REFLECTION, EXCHANGE, HEARTBEAT, UNKNOWN)
    }
    assert {method for method, outcome in outcomes.items() if not isinstance(outcome, Refusal)} == allowed
    blames = {outcome.blame for outcome in outcomes.values() if isinstance(outcome, Refusal)}
    assert blames <= {Blame.UNAUTHENTICATED if role is None else Blame.PERMISSION}


def test_every_method_of_the_service_is_in_the_table() -> None:
    """One that is forgotten would be refused to ranks."""
    services = (
        pb.DESCRIPTOR.services_by_name["StatisticsService"],
        observed.DESCRIPTOR.services_by_name["ObservationService"],
    )
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert methods <= set(METHODS)
    readers = {method for method, need in METHODS.items() if need.role is Role.READER}
    assert {f"/{OBSERVATION_NAME}/ListJobs", f"/{OBSERVATION_NAME}/ReadStatistics", "/metrics"} < readers


@pytest.mark.parametrize(
    ("shown", "blame"),
    [
        (None, Blame.UNAUTHENTICATED),
        ("", Blame.UNAUTHENTICATED),
        ("WORKER", Blame.UNAUTHENTICATED),
        ("Basic WORKER", Blame.UNAUTHENTICATED),
        ("Bearer", Blame.UNAUTHENTICATED),
        ("Bearer ", Blame.UNAUTHENTICATED),
        ("Bearer WORKE", Blame.UNAUTHENTICATED),
        ("Bearer WORKER ", Blame.UNAUTHENTICATED),
        ("Bearer worker", Blame.UNAUTHENTICATED),
        ("Bearer \udcff", Blame.UNAUTHENTICATED),
        ("Bearer " + "x" * 10**6, Blame.UNAUTHENTICATED),
        ("Bearer READER", Blame.PERMISSION),
        ("bearer WORKER", None),
    ],
)
def test_what_is_shown(shown: str | None, blame: Blame | None) -> None:
    """The scheme in any case, the token exactly."""
    outcome = authenticate(GRANTS, EXCHANGE, shown)
    assert (outcome.blame if isinstance(outcome, Refusal) else None) is blame


@pytest.mark.parametrize(("job", "allowed"), [("a-1", True), ("a-", True), ("b", True), ("a", False), ("B", False)])
def test_jobs_are_named_or_match_a_pattern(job: str, allowed: bool) -> None:
    """As file names do, upper and lower case apart."""
    (grant, _, _) = GRANTS.grants
    assert (authorize(grant, job) is None) is allowed


def test_a_refusal_is_short_and_quotes_what_was_asked_for() -> None:
    """A job's name is the caller's: it neither fills a log nor begins a line of it."""
    (grant, _, _) = GRANTS.grants
    refusal = authorize(grant, "\n" + "x" * 10**6)
    assert isinstance(refusal, Refusal)
    assert len(refusal.text) < 400
    assert "\n" not in refusal.text


def test_all_tokens_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """However early the right one comes: the time tells nothing."""
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr("bnserver.authorization.hmac.compare_digest", compare)
    grant = GRANTS.find("READER")
    assert grant is not None
    assert grant.role is Role.READER
    assert len(compared) == 3


def test_no_text_holds_a_token() -> None:
    """Neither the file that is written nor what is read from it."""
    text = entry("a", "s3cret", ["*"], Role.ADMIN)
    assert "s3cret" not in text + repr(parse(text).grants)
    assert parse('[[token]]\nname="a"\ntoken="s3cret"\njobs=["*"]\nrole="admin"').grants == parse(text).grants


def test_odd_names_are_written_as_they_are_read() -> None:
    """Quotes and backslashes are no end of a string."""
    assert parse(entry('a"\\é', "t", ['"\n*'], Role.READER)).grants[0].jobs == ('"\n*',)
    assert parse("").grants == ()


_GOOD = 'name = "a"\ntoken = "t"\njobs = ["*"]\nrole = "worker"\n'


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[[token]", "expected TOML: "),
        ("[[token]]\n" * 1001, "expected at most 1000 tokens, received 1001"),
        ("x = 1", "expected [[token]] tables alone, received 'x'"),
        ("token = 1", "expected [[token]] tables alone, received one [token]"),
        ("token = [1]", "token 1: expected a table"),
        (f"[[token]]\n{_GOOD}extra = 1", "token 1: unknown key 'extra'; known are name, token, sha256, jobs, role"),
        ("[[token]]\n" + _GOOD.replace('"a"', '""'), "token 1: expected name, 1 to 100 printable characters"),
        ("[[token]]\n" + _GOOD.replace('"a"', '"a\\n"'), "token 1: expected name, 1 to 100 printable characters"),
        (
            "[[token]]\n" + _GOOD.replace('["*"]', '"*"'),
            "token 1 ('a'): expected jobs, a list of names or patterns, e.g. [\"team-a-*\"]",
        ),
        (
            "[[token]]\n" + _GOOD.replace('"worker"', '"root"'),
            "token 1 ('a'): expected role reader, worker, admin, received 'root'",
        ),
        ("[[token]]\n" + _GOOD.replace('token = "t"\n', ""), "token 1 ('a'): expected either sha256 or token"),
        (f'[[token]]\n{_GOOD}sha256 = "00"', "token 1 ('a'): expected either sha256 or token"),
        (
            "[[token]]\n" + _GOOD.replace('token = "t"', 'sha256 = "00"'),
            "token 1 ('a'): expected sha256 to be 64 hexadecimal digits",
        ),
        (
            "[[token]]\n" + _GOOD.replace('"t"', '"my secret"'),
            "token 1 ('a'): expected a token of 1 to 512 letters, digits and ._~+/-, received 9 characters that",
        ),
        (
            f"[[token]]\n{_GOOD}[[token]]\n{_GOOD}",
            "token 2 ('a'): expected another name, a token before it has this one",
        ),
        (
            f"[[token]]\n{_GOOD}[[token]]\n" + _GOOD.replace('"a"', '"b"'),
            "token 2 ('b'): expected another token, 'a' has it",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_none(text: str, error: str) -> None:
    """The place is named, and no token is shown."""
    with pytest.raises(TokensError, match="^" + re.escape(error)) as caught:
        parse(text)
    assert "secret" not in str(caught.value)


def test_a_grant_is_what_the_file_says() -> None:
    """Nothing is added."""
    assert Grants([]).find("t") is None
    (grant,) = parse(f"[[token]]\n{_GOOD}").grants
    assert grant == Grant("a", grant.digest, ("*",), Role.WORKER)
