"""Authorization: who may do what in which job. A pure decision over a file of tokens.

Laws:
1. Without tokens everybody who reaches the service may do everything; that is for loopback, and for certificates.
2. With tokens every call shows one, and what is not allowed here is not allowed: a method that is not in the table is
   for administrators alone.
3. All tokens are compared, each in constant time; only digests are kept, and no text holds a token.

The file:

    [[token]]
    name = "team-a"                 # for the log and for errors
    sha256 = "9f86d0818..."         # of the token; or token = "...", in clear text
    jobs = ["team-a-*", "shared"]   # * stands for any characters, ? for one
    role = "worker"                 # reader, worker or admin
"""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from fnmatch import fnmatchcase
from typing import Any

from bnproto.credentials import CredentialsError, valid_token
from bnproto.grpc_options import OBSERVATION_NAME, SERVICE_NAME

MOST = 1000  # all are compared with each that is shown, and the file is read while ranks are served
_LONGEST = 1000  # characters of what may be a token


class Role(IntEnum):
    """What a token allows in its jobs; each role may do all that the ones before may."""

    READER = 1  # look
    WORKER = 2  # be a rank, and so change the statistics
    ADMIN = 3  # everything


@dataclass(frozen=True, slots=True)
class Need:
    """What a method asks for.

    Attributes:
        role: that the token must have; None: no token is needed.
        of_job: whether the request names a job, which must be one of the token's.
        purpose: what the method is for, after "to".
    """

    role: Role | None
    of_job: bool
    purpose: str


METRICS = "/metrics"  # over HTTP, on a port of its own
PAGE = "/events"  # likewise: the data of the web page

_OTHER = Need(Role.ADMIN, of_job=False, purpose="administer the service")

METHODS: Mapping[str, Need] = {
    f"/{SERVICE_NAME}/Exchange": Need(Role.WORKER, of_job=True, purpose="join"),
    f"/{SERVICE_NAME}/Heartbeat": Need(Role.WORKER, of_job=True, purpose="take part"),
    f"/{OBSERVATION_NAME}/ListJobs": Need(Role.READER, of_job=False, purpose="list jobs"),
    f"/{OBSERVATION_NAME}/ReadStatistics": Need(Role.READER, of_job=True, purpose="read statistics"),
    METRICS: Need(Role.READER, of_job=False, purpose="read metrics"),
    PAGE: Need(Role.READER, of_job=False, purpose="see the dashboard"),
    # Probes of orchestrators have no tokens, and learn nothing of any job.
    "/grpc.health.v1.Health/Check": Need(None, of_job=False, purpose="ask for its health"),
    "/grpc.health.v1.Health/List": Need(None, of_job=False, purpose="ask for its health"),
    "/grpc.health.v1.Health/Watch": Need(None, of_job=False, purpose="ask for its health"),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Need(
        Role.READER, of_job=False, purpose="ask for its methods"
    ),
}


class TokensError(ValueError):
    """The text is no list of tokens; says where and why."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A token, as the file lists it.

    Attributes:
        name: whose it is.
        digest: SHA-256 of the token.
        jobs: patterns of the names of the jobs that it is for.
        role: what it allows there.
    """

    name: str
    digest: bytes
    jobs: tuple[str, ...]
    role: Role

    def covers(self, job: str) -> bool:
        """Whether a job is one of the token's."""
        return any(fnmatchcase(job, pattern) for pattern in self.jobs)


class Blame(Enum):
    """Why a call is refused."""

    UNAUTHENTICATED = "unauthenticated"  # it is not known who calls
    PERMISSION = "permission"  # it is known who calls, and that they may not


@dataclass(frozen=True, slots=True)
class Refusal:
    """A call that is not allowed.

    Attributes:
        blame: why.
        text: for the caller.
        name: of the token that was shown; "" if there was none, or it is unknown.
    """

    blame: Blame
    text: str
    name: str = ""


class Grants:
    """All tokens.

    Args:
        grants: what the file lists.
    """

    def __init__(self, grants: Iterable[Grant]) -> None:
        self.grants = tuple(grants)

    def find(self, token: str) -> Grant | None:
        """Whose token it is. All are compared, so that the time says nothing of which one is alike."""
        digest = _digest(token)
        matching = None
        for grant in self.grants:
            if hmac.compare_digest(grant.digest, digest):
                matching = grant
        return matching


def need_of(method: str) -> Need:
    """What a method asks for."""
    return METHODS.get(method, _OTHER)


def authenticate(grants: Grants, method: str, authorization: str | None) -> Grant | Refusal | None:
    """Decide who calls, before the request is read.

    Args:
        grants: all tokens.
        method: the full name, "/package.Service/Method".
        authorization: the metadata of this name; None: there is none.

    Returns:
        The token that was shown; None where none is needed.
    """
    need = need_of(method)
    if need.role is None:
        return None
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        return Refusal(
            Blame.UNAUTHENTICATED,
            "This service asks for a token, and received none. Ask whoever runs it for one, and give it by "
            "BNLAYER_TOKEN_FILE, BNLAYER_TOKEN or join(token=).",
        )
    grant = grants.find(token) if len(token) <= _LONGEST else None
    if grant is None:
        return Refusal(
            Blame.UNAUTHENTICATED,
            "The service does not know this token. It may have been replaced: ask whoever runs the service for the "
            "present one.",
        )
    if grant.role < need.role:
        return Refusal(
            Blame.PERMISSION,
            f"The token {grant.name!r} has the role {_name(grant.role)}, and to {need.purpose} the role "
            f"{_name(need.role)} is needed. Use another token, or ask whoever runs the service for that role.",
            grant.name,
        )
    return grant


def authorize(grant: Grant, job: str) -> Refusal | None:
    """Decide whether a call may be about a job; None: it may."""
    if grant.covers(job):
        return None
    return Refusal(
        Blame.PERMISSION,
        f"The token {grant.name!r} is not for job {_short(job)}, but for {_short(', '.join(grant.jobs))}. Use the "
        "token of that job, or another name: job= or BNLAYER_JOB.",
        grant.name,
    )


def parse(text: str) -> Grants:
    """Read the file of tokens.

    Raises:
        TokensError: it is no such file; the text names the token by its place, and never shows it.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TokensError(f"expected TOML: {error}") from None
    tables = table.pop("token", [])
    if table or not isinstance(tables, list):
        raise TokensError(f"expected [[token]] tables alone, received {', '.join(map(repr, table)) or 'one [token]'}")
    if len(tables) > MOST:
        raise TokensError(f"expected at most {MOST} tokens, received {len(tables)}")
    grants = [_grant(token, f"token {number}") for number, token in enumerate(tables, 1)]
    names: set[str] = set()
    owners: dict[bytes, str] = {}
    for number, grant in enumerate(grants, 1):
        if grant.name in names:
            raise TokensError(f"token {number} ({grant.name!r}): expected another name, a token before it has this one")
        if grant.digest in owners:
            raise TokensError(
                f"token {number} ({grant.name!r}): expected another token, {owners[grant.digest]!r} has it"
            )
        names.add(grant.name)
        owners[grant.digest] = grant.name
    return Grants(grants)


def entry(name: str, token: str, jobs: Iterable[str], role: Role) -> str:
    """A token's entry in the file, which holds its digest alone."""
    listed = ", ".join(_quoted(job) for job in jobs)
    return (
        f'[[token]]\nname = {_quoted(name)}\nsha256 = "{_digest(token).hex()}"\njobs = [{listed}]\n'
        f'role = "{_name(role)}"\n'
    )


def role_of(name: object) -> Role:
    """The role of a name.

    Raises:
        TokensError: there is none.
    """
    for role in Role:
        if name == _name(role):
            return role
    raise TokensError(f"expected role {', '.join(map(_name, Role))}, received {name!r}")


def _grant(entry: Any, where: str) -> Grant:
    if not isinstance(entry, dict):
        raise TokensError(f"{where}: expected a table")
    unknown = set(entry) - {"name", "token", "sha256", "jobs", "role"}
    if unknown:
        raise TokensError(f"{where}: unknown key {min(unknown)!r}; known are name, token, sha256, jobs, role")
    name, jobs = entry.get("name"), entry.get("jobs")
    if not (isinstance(name, str) and 1 <= len(name) <= 100 and name.isprintable()):
        raise TokensError(f"{where}: expected name, 1 to 100 printable characters")
    where = f"{where} ({name!r})"
    if not (isinstance(jobs, list) and jobs and all(isinstance(job, str) and job for job in jobs)):
        raise TokensError(f'{where}: expected jobs, a list of names or patterns, e.g. ["team-a-*"]')
    try:
        return Grant(name, _digest_in(entry, where), tuple(jobs), role_of(entry.get("role")))
    except TokensError as error:
        raise TokensError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _digest_in(entry: Mapping[str, Any], where: str) -> bytes:
    if ("token" in entry) is ("sha256" in entry):
        raise TokensError(f"{where}: expected either sha256 or token")
    if "token" in entry:
        if not isinstance(entry["token"], str):
            raise TokensError(f"{where}: expected token to be a string")
        try:
            return _digest(valid_token(entry["token"], where))
        except CredentialsError as error:
            raise TokensError(str(error)) from None
    try:
        digest = bytes.fromhex(entry["sha256"])
    except (TypeError, ValueError):
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise TokensError(f"{where}: expected sha256 to be 64 hexadecimal digits")
    return digest


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _name(role: Role) -> str:
    return role.name.lower()


def _short(text: str) -> str:
    """What a caller or a file says, quoted, and no longer than an error should be."""
    return repr(text if len(text) <= 100 else f"{text[:99]}…")


def _quoted(text: str) -> str:
    """A string in TOML."""
    escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{escaped}"'
