"""Who may join: certificates, tokens, and what a rank is told that may not.

Each refusal comes at once, on every rank that is refused, whatever its timeout; the other jobs do not notice.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from bnlayer import BatchNormalization, ServiceError
from bnproto.connection import Connector
from bnproto.credentials import NONE, Credentials
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver.authorization import Role, entry
from bnworker import World
from bnworker.transports.service import ServiceTransport
from support.authorities import Authority

pytestmark = pytest.mark.rpc

_X = np.arange(12, dtype=np.float32).reshape(6, 2)
_LONG_S = 200.0  # nobody waits so long: what is refused is refused at once


def _world(
    address: str, credentials: Credentials = NONE, job: str = "job", rank: int = 0, world_size: int = 1
) -> World:
    transport = ServiceTransport(address, job, rank, world_size, timeout=_LONG_S, credentials=credentials)
    return World(transport, install=False)


def _refused(address: str, credentials: Credentials = NONE, job: str = "job") -> str:
    """What both ranks of a job are told; a rank that waited for its timeout would outlast the test's own."""
    told: list[str] = []

    def join(rank: int) -> None:
        try:
            _world(address, credentials, job, rank, 2)
        except ServiceError as error:
            told.append(str(error))

    ranks = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(_LONG_S / 2)
    assert len(told) == 2
    assert told[0] == told[1]
    return told[0]


def _tokens(path: Path, *listed: tuple[str, str, list[str], Role]) -> list[str]:
    """A daemon's flags, with a file of tokens: name, token, jobs, role."""
    path.touch(0o600)
    path.write_text("\n".join(entry(*one) for one in listed))
    return ["--tokens", str(path)]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """The CA of the service, and of ranks."""
    return Authority(tmp_path / "authority")


def _exchanges(world: World) -> None:
    """One exchange, whose result is that of one process."""
    alone = BatchNormalization(name="a")
    shared = BatchNormalization(synchronized=True, name="a", collective=world)
    assert np.asarray(shared(_X, training=True)).tobytes() == np.asarray(alone(_X, training=True)).tobytes()


# ---- certificates ----


@pytest.mark.parametrize("local_socket", [True, False])
def test_certificates_on_both_sides(serve: Callable[..., Any], authority: Authority, local_socket: bool) -> None:
    """mTLS: both know who the other is, and exchange as ever, over the stream and over the local socket."""
    service = serve(*authority.flags(), "--tls-client-ca", str(authority.ca))
    shown = authority.credentials(authority.issue("rank"))
    transport = ServiceTransport(
        service.address, "job", 0, 1, timeout=_LONG_S, local_socket=local_socket, credentials=shown
    )
    with World(transport, install=False) as world:
        _exchanges(world)


def test_another_authority(serve: Callable[..., Any], authority: Authority, tmp_path: Path) -> None:
    """Somebody else's service, or somebody in between."""
    service = serve(*authority.flags())
    other = Authority(tmp_path / "other")
    assert _refused(service.address, other.credentials()).startswith(
        f"The certificate of the service at {service.address} is not signed by the CA in BNLAYER_TLS_CA ({other.ca}): "
    )


def test_a_certificate_for_another_host(serve: Callable[..., Any], authority: Authority) -> None:
    """It is another machine's."""
    service = serve(*authority.flags("server", "trainer.example"))
    assert _refused(service.address, authority.credentials()) == (
        f"The certificate of the service at {service.address} is not for '127.0.0.1'. Reach it by a name that is in "
        "the certificate (BNLAYER_ADDRESS); or whoever runs the service renews it with this one: bnlayer certs init "
        "--renew --host 127.0.0.1"
    )


def test_no_client_certificate(serve: Callable[..., Any], authority: Authority) -> None:
    """The service asks for one."""
    service = serve(*authority.flags(), "--tls-client-ca", str(authority.ca))
    assert _refused(service.address, authority.credentials()) == (
        f"The service at {service.address} asks for a client certificate, and this process has none: set "
        "BNLAYER_TLS_CERT and BNLAYER_TLS_KEY to one that is signed by its client CA."
    )


@pytest.mark.parametrize(
    ("expired", "why"),
    [
        (False, "it is not signed by a CA of its --tls-client-ca. Get one that is from whoever runs the service."),
        (True, "certificate has expired. Get another one from whoever runs the service."),
    ],
)
def test_a_client_certificate_that_is_refused(
    serve: Callable[..., Any], authority: Authority, tmp_path: Path, expired: bool, why: str
) -> None:
    """Another CA's, or one that has ended."""
    service = serve(*authority.flags(), "--tls-client-ca", str(authority.ca))
    client = (authority if expired else Authority(tmp_path / "other")).issue("rank", expired=expired)
    assert _refused(service.address, authority.credentials(client)) == (
        f"The service at {service.address} refuses the client certificate in BNLAYER_TLS_CERT ({client[0]}): {why}"
    )


def test_plain_text_to_a_service_that_speaks_tls(serve: Callable[..., Any], authority: Authority) -> None:
    """The rank lacks the CA."""
    service = serve(*authority.flags(), "--tls-client-ca", str(authority.ca))
    assert _refused(service.address) == (
        f"The service at {service.address} speaks TLS, and this process plain text: set BNLAYER_TLS_CA to the "
        "certificate of the service's CA."
    )


def test_tls_to_a_service_that_speaks_plain_text(serve: Callable[..., Any], authority: Authority) -> None:
    """Nothing is sent in plain text because the other side has no certificate."""
    service = serve()
    assert _refused(service.address, authority.credentials()) == (
        f"What listens at {service.address} speaks no TLS, which BNLAYER_TLS_CA asks for: start the service with "
        "--tls-cert and --tls-key, or unset BNLAYER_TLS_CA if the network is your own."
    )


def test_an_expired_certificate(authority: Authority) -> None:
    """The daemon would not use it, so the server here is gRPC's own."""
    certificate, key = authority.issue("server", expired=True)
    pair = key.read_bytes(), certificate.read_bytes()
    threads = ThreadPoolExecutor(1)
    server = grpc.server(threads)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        assert _refused(f"127.0.0.1:{port}", authority.credentials()) == (
            f"The certificate of the service at 127.0.0.1:{port} has expired. Whoever runs the service renews it: "
            "bnlayer certs init --renew, then SIGHUP."
        )
    finally:
        server.stop(None).wait()
        threads.shutdown()


def test_rotation_without_a_failed_exchange(serve: Callable[..., Any], authority: Authority, tmp_path: Path) -> None:
    """SIGHUP: those who come find the new certificate, those who are there go on, and a bad one changes nothing."""
    log = tmp_path / "log"
    service = serve(*authority.flags(), "--log-file", str(log))
    with _world(service.address, authority.credentials()) as world:
        _exchanges(world)
        other = Authority(tmp_path / "other")
        other.issue("server")
        for name in ("server.pem", "server-key.pem"):
            (tmp_path / "authority" / name).write_bytes((tmp_path / "other" / name).read_bytes())
            service.signal(signal.SIGHUP)
            _until(log, "key values mismatch" if name == "server.pem" else "certificates: now")
            world.barrier()
        assert "What was read before stays in use." in log.read_text()
        with _world(service.address, other.credentials(), "another") as late:
            _exchanges(late)
        assert "not signed by the CA" in _refused(service.address, authority.credentials())
        world.barrier()


def test_an_expired_certificate_is_not_used(start: Callable[..., Any], authority: Authority) -> None:
    """The daemon tells its operator, before it tells its ranks."""
    certificate, key = authority.issue("server", expired=True)
    code, _, err = start(
        "-m", "bnserver", "--listen", "127.0.0.1:0", "--tls-cert", str(certificate), "--tls-key", str(key)
    ).end(within=150)
    assert code == 1
    assert err == (
        f"bnserver: The certificate in {certificate} can't be used: certificate has expired. Make another one, e.g. "
        "bnlayer certs init --renew.\n"
    )


# ---- tokens ----


@pytest.fixture
def guarded(serve: Callable[..., Any], authority: Authority, tmp_path: Path) -> Any:
    """A daemon with TLS and three tokens."""
    listed = _tokens(
        tmp_path / "tokens.toml",
        ("team", "team-secret", ["team-*", "job"], Role.WORKER),
        ("eval", "eval-secret", ["*"], Role.READER),
        ("ops", "ops-secret", ["*"], Role.ADMIN),
    )
    return serve(*authority.flags(), *listed, "--log-file", str(tmp_path / "log"))


@pytest.mark.parametrize(("token", "job"), [("team-secret", "team-7"), ("ops-secret", "any")])
@pytest.mark.parametrize("local_socket", [True, False])
def test_a_token_of_the_job(guarded: Any, authority: Authority, token: str, job: str, local_socket: bool) -> None:
    """A worker's in its jobs, an administrator's in all; heartbeats show it, too."""
    shown = authority.credentials(token=token)
    transport = ServiceTransport(
        guarded.address, job, 0, 1, timeout=_LONG_S, local_socket=local_socket, credentials=shown
    )
    with World(transport, install=False) as world:
        _exchanges(world)


@pytest.mark.parametrize(
    ("token", "job", "text"),
    [
        (
            None,
            "job",
            "This service asks for a token, and received none. Ask whoever runs it for one, and give it by "
            "BNLAYER_TOKEN_FILE, BNLAYER_TOKEN or join(token=).",
        ),
        (
            "guessed-secret",
            "job",
            "The service does not know this token. It may have been replaced: ask whoever runs the service for the "
            "present one.",
        ),
        (
            "eval-secret",
            "job",
            "The token 'eval' has the role reader, and to join the role worker is needed. Use another token, or ask "
            "whoever runs the service for that role.",
        ),
        (
            "team-secret",
            "theirs",
            "The token 'team' is not for job 'theirs', but for 'team-*, job'. Use the token of that job, or another "
            "name: job= or BNLAYER_JOB.",
        ),
    ],
    ids=["missing", "unknown", "reader that writes", "another job"],
)
def test_a_token_that_is_refused(
    guarded: Any, authority: Authority, tmp_path: Path, token: str | None, job: str, text: str
) -> None:
    """Each for its own reason; no log and no error holds a token."""
    assert _refused(guarded.address, authority.credentials(token=token), job) == text
    log = (tmp_path / "log").read_text()
    assert text in log
    assert "secret" not in log
    assert guarded.end(signal.SIGTERM)[0] == 0


def test_heartbeats_of_another_job_are_refused(guarded: Any, authority: Authority) -> None:
    """They would keep a frozen rank of it alive."""
    connector = Connector(guarded.address, authority.credentials(token="team-secret"))
    with connector.channel() as channel:
        call = rpc.StatisticsServiceStub(channel).Heartbeat
        assert call(pb.HeartbeatRequest(job="team-7", rank=0, incarnation=1), timeout=_LONG_S).boot_id
        with pytest.raises(grpc.RpcError) as caught:
            call(pb.HeartbeatRequest(job="theirs", rank=0, incarnation=1), timeout=_LONG_S)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_token_that_is_withdrawn_ends_its_streams(guarded: Any, authority: Authority, tmp_path: Path) -> None:
    """After SIGHUP: the rank that has it is told why, the other's job goes on."""
    ops = _world(guarded.address, authority.credentials(token="ops-secret"))
    team = _world(guarded.address, authority.credentials(token="team-secret"), "team-7")
    _exchanges(team)
    path = tmp_path / "tokens.toml"
    whole = path.read_text()
    path.write_text("[[token]")
    guarded.signal(signal.SIGHUP)
    _until(tmp_path / "log", "What was read before stays in use.")
    team.barrier()
    path.write_text(whole[whole.index('[[token]]\nname = "eval"') :])
    guarded.signal(signal.SIGHUP)
    _until(tmp_path / "log", "1 streams ended")
    with pytest.raises(ServiceError) as caught:
        team.barrier()
    assert str(caught.value) == (
        "The token 'team' was withdrawn, or is not for this job any more. Ask whoever runs the service for another one, "
        "and start the job again."
    )
    team.leave()
    with ops as world:
        _exchanges(world)


def test_a_token_file_that_others_may_read(start: Callable[..., Any], tmp_path: Path) -> None:
    """Whoever reads it has every job."""
    flags = _tokens(tmp_path / "tokens.toml", ("a", "s", ["*"], Role.ADMIN))
    Path(flags[1]).chmod(0o644)
    code, _, err = start("-m", "bnserver", "--listen", "127.0.0.1:0", *flags).end(within=150)
    assert code == 1
    assert err == (
        f"bnserver: --tokens: {flags[1]} holds a secret, and others on this machine may read or change it (mode 0644). "
        f"Make it yours alone: chmod 600 {flags[1]}\n"
    )


def test_sighup_never_kills(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Where there is nothing to read anew, it is logged, and nothing else."""
    service = serve("--log-file", str(tmp_path / "log"))
    service.signal(signal.SIGHUP)
    _until(tmp_path / "log", "SIGHUP: there are neither certificates nor tokens to read anew")
    with _world(service.address) as world:
        _exchanges(world)


def _until(log: Path, text: str) -> None:
    """Wait until a daemon's log holds a text."""
    pause = threading.Event()
    while text not in log.read_text():
        pause.wait(0.01)
