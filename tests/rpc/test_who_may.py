"""Who may join: certificates, tokens, and what a rank is told that may not.

Each refusal comes at once, on every rank that is refused, whatever its timeout; the other jobs do not notice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bnlayer import BatchNormalization, ServiceError
from bnproto.connection import Connector
from bnproto.credentials import NONE, Credentials
from bnproto.grpc_options import SERVICE_NAME
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from bnserver.authorization import Role, entry
from bnworker import World
from bnworker.transports.service import ServiceTransport
from support.authorities import Authority
from support.processes import arguments, script
from support.service import daemon

pytestmark = pytest.mark.rpc

_X = np.arange(12, dtype=np.float32).reshape(6, 2)
_ROOT = Path(__file__).parents[2]
_LONG_S = 200.0  # nobody waits so long: what is refused is refused at once


def _world(
    address: str, credentials: Credentials = NONE, job: str = "job", rank: int = 0, world_size: int = 1
) -> World:
    transport = ServiceTransport(address, job, rank, world_size, timeout=_LONG_S, credentials=credentials)
    return World(transport, install=False)


def _refused(address: str, credentials: Credentials = NONE, job: str = "job") -> str:
    """What both ranks of a job are told; a rank that waited for its timeout would outlast the test's own."""
    texts: list[str] = []

    def join(rank: int) -> None:
        try:
            _world(address, credentials, job, rank, 2)
        except ServiceError as error:
            texts.append(str(error))

    ranks = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(_LONG_S / 2)
    assert len(texts) == 2
    assert texts[0] == texts[1]
    return texts[0]


def _tokens(path: Path) -> list[str]:
    """A daemon's flags, with a file of three tokens."""
    path.touch(0o600)
    path.write_text(
        entry("team", "team-secret", ["team-*", "job"], Role.WORKER)
        + entry("eval", "eval-secret", ["*"], Role.READER)
        + entry("ops", "ops-secret", ["*"], Role.ADMIN)
    )
    return ["--tokens", str(path)]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA of the services, and of ranks."""
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture(scope="module")
def mutual(authority: Authority) -> Iterator[str]:
    """The address of a daemon that asks for certificates."""
    with daemon(*authority.flags("mutual"), "--tls-client-ca", str(authority.ca)) as address:
        yield address


@pytest.fixture(scope="module")
def guarded(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a daemon with a certificate and tokens, and its log."""
    folder = tmp_path_factory.mktemp("tokens")
    with daemon(
        *authority.flags("guarded"), *_tokens(folder / "tokens.toml"), "--log-file", str(folder / "log"), "--reflection"
    ) as address:
        yield address, folder / "log"


@contextmanager
def _grpc_server(pair: tuple[Path, Path] | None) -> Iterator[str]:
    """A server of gRPC's own, which uses any certificate; None: plain text. Yields its address."""
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        if pair is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            certificate, key = pair
            credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


def _exchanges(world: World) -> None:
    """One exchange, whose result is that of one process."""
    alone = BatchNormalization(name="a")
    shared = BatchNormalization(synchronized=True, name="a", collective=world)
    assert np.asarray(shared(_X, training=True)).tobytes() == np.asarray(alone(_X, training=True)).tobytes()


# ---- certificates ----


@pytest.mark.parametrize("local_socket", [True, False])
def test_certificates_on_both_sides(mutual: str, authority: Authority, local_socket: bool) -> None:
    """mTLS: both know who the other is, and exchange as ever, over the stream and over the local socket."""
    shown = authority.credentials(authority.issue("rank"))
    transport = ServiceTransport(mutual, "mutual", 0, 1, timeout=_LONG_S, local_socket=local_socket, credentials=shown)
    with World(transport, install=False) as world:
        _exchanges(world)


def test_another_authority(mutual: str, tmp_path: Path) -> None:
    """Somebody else's service, or somebody in between."""
    other = Authority(tmp_path / "other")
    assert _refused(mutual, other.credentials()).startswith(
        f"The certificate of the service at {mutual} is not signed by the CA in BNLAYER_TLS_CA ({other.ca}): "
    )


def test_a_certificate_for_another_host(authority: Authority) -> None:
    """It is another machine's."""
    with _grpc_server(authority.issue("elsewhere", "trainer.example")) as address:
        assert _refused(address, authority.credentials()) == (
            f"The certificate of the service at {address} is not for '127.0.0.1'. Reach it by a name that is in the "
            "certificate (BNLAYER_ADDRESS); or whoever runs the service renews it with this one: bnlayer certs init "
            "--renew --host 127.0.0.1"
        )


def test_an_expired_certificate(authority: Authority) -> None:
    """The daemon would not start with one; it may end while it runs."""
    with _grpc_server(authority.issue("ended", expired=True)) as address:
        assert _refused(address, authority.credentials()) == (
            f"The certificate of the service at {address} has expired. Whoever runs the service renews it: bnlayer "
            "certs init --renew, then SIGHUP."
        )


def test_no_client_certificate(mutual: str, authority: Authority) -> None:
    """The service asks for one."""
    assert _refused(mutual, authority.credentials()) == (
        f"The service at {mutual} asks for a client certificate, and this process has none: set BNLAYER_TLS_CERT and "
        "BNLAYER_TLS_KEY to one that is signed by its client CA."
    )


@pytest.mark.parametrize(
    ("expired", "why"),
    [
        (False, "it is not signed by a CA of its --tls-client-ca. Get one that is from whoever runs the service."),
        (True, "certificate has expired. Get another one from whoever runs the service."),
    ],
)
def test_a_client_certificate_that_is_refused(
    mutual: str, authority: Authority, tmp_path: Path, expired: bool, why: str
) -> None:
    """Another CA's, or one that has ended."""
    client = (authority if expired else Authority(tmp_path / "other")).issue("rank", expired=expired)
    assert _refused(mutual, authority.credentials(client)) == (
        f"The service at {mutual} refuses the client certificate in BNLAYER_TLS_CERT ({client[0]}): {why}"
    )


def test_plain_text_to_a_service_that_speaks_tls(mutual: str) -> None:
    """The rank lacks the CA."""
    assert _refused(mutual) == (
        f"The service at {mutual} speaks TLS, and this process plain text: set BNLAYER_TLS_CA to the certificate of "
        "the service's CA."
    )


def test_tls_to_a_service_that_speaks_plain_text(authority: Authority) -> None:
    """Nothing is sent in plain text because the other side has no certificate."""
    with _grpc_server(None) as address:
        assert _refused(address, authority.credentials(token="secret")) == (
            f"What listens at {address} speaks no TLS, which BNLAYER_TLS_CA asks for: start the service with "
            "--tls-cert and --tls-key, or unset BNLAYER_TLS_CA if the network is your own."
        )


# ---- tokens ----


@pytest.mark.parametrize(("token", "job"), [("team-secret", "team-7"), ("ops-secret", "any")])
@pytest.mark.parametrize("local_socket", [True, False])
def test_a_token_of_the_job(
    guarded: tuple[str, Path], authority: Authority, token: str, job: str, local_socket: bool
) -> None:
    """A worker's in its jobs, an administrator's in all; heartbeats show it, too."""
    shown = authority.credentials(token=token)
    transport = ServiceTransport(guarded[0], job, 0, 1, timeout=_LONG_S, local_socket=local_socket, credentials=shown)
    with World(transport, install=False) as world:
        _exchanges(world)


@pytest.mark.parametrize(
    ("token", "job", "text"),
    [
        (
            None,
            "job",
            (
                "This service asks for a token, and received none. Ask whoever runs it for one, and give it by "
                "BNLAYER_TOKEN_FILE, BNLAYER_TOKEN or join(token=)."
            ),
        ),
        (
            "guessed-secret",
            "job",
            (
                "The service does not know this token. It may have been replaced: ask whoever runs the service for the "
                "present one."
            ),
        ),
        (
            "eval-secret",
            "job",
            (
                "The token 'eval' has the role reader, and to join the role worker is needed. Use another token, or "
                "ask whoever runs the service for that role."
            ),
        ),
        (
            "team-secret",
            "theirs",
            (
                "The token 'team' is not for job 'theirs', but for 'team-*, job'. Use the token of that job, or "
                "another name: job= or BNLAYER_JOB."
            ),
        ),
    ],
    ids=["missing", "unknown", "reader that writes", "another job"],
)
def test_a_token_that_is_refused(
    guarded: tuple[str, Path], authority: Authority, token: str | None, job: str, text: str
) -> None:
    """Each for its own reason; no log and no error holds a token."""
    address, log = guarded
    assert _refused(address, authority.credentials(token=token), job) == text
    assert "refused ipv4:127.0.0.1:" in log.read_text()
    assert "secret" not in log.read_text()


def test_ranks_that_are_configured_by_their_environment(
    guarded: tuple[str, Path], authority: Authority, tmp_path: Path
) -> None:
    """As users start them: the launcher passes on what it was given, and `join` uses it."""
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("team-secret\n")
    command = script("import bnworker\nwith bnworker.join() as w: print(w.transport, *w.allreduce([rank]))")
    done = subprocess.run(
        arguments(2, *command, options=["--address", guarded[0], "--job", "team-9"]),
        env={**os.environ, "BNLAYER_TLS_CA": str(authority.ca), "BNLAYER_TOKEN_FILE": str(token)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert sorted(done.stdout.splitlines()) == ["[0] service 1", "[1] service 1"], done.stderr


def test_health_needs_no_token(guarded: tuple[str, Path], authority: Authority) -> None:
    """An orchestrator asks; `bnlayer doctor` and the image's health check do, too, with the CA that ranks have."""
    environ = {**os.environ, "BNLAYER_TLS_CA": str(authority.ca)}
    for command in (
        ["-m", "bnworker.cli", "doctor", "--json", "--address", guarded[0]],
        [str(_ROOT / "deploy/docker/healthcheck.py"), guarded[0]],
    ):
        done = subprocess.run(
            [sys.executable, *command], env=environ, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if done.stdout:
            service = json.loads(done.stdout)["service"]
            assert service == {"address": guarded[0], "serving": True, "text": f"{guarded[0]} answers: SERVING"}


@pytest.mark.parametrize(("token", "code"), [("eval-secret", None), (None, grpc.StatusCode.UNAUTHENTICATED)])
def test_reflection_where_it_was_asked_for(
    guarded: tuple[str, Path], authority: Authority, token: str | None, code: grpc.StatusCode | None
) -> None:
    """Tools find the methods, with any token."""
    connector = Connector(guarded[0], authority.credentials(token=token))
    with connector.channel() as channel:
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        service: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # its types lack the calls
        answers = service.ServerReflectionInfo(iter([ask]), timeout=_LONG_S)
        if code is None:
            names = {listed.name for listed in next(answers).list_services_response.service}
            assert SERVICE_NAME in names
            return
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is code


def test_heartbeats_of_another_job_are_refused(guarded: tuple[str, Path], authority: Authority) -> None:
    """They would keep a frozen rank of it alive."""
    connector = Connector(guarded[0], authority.credentials(token="team-secret"))
    with connector.channel() as channel:
        call = rpc.StatisticsServiceStub(channel).Heartbeat
        assert call(pb.HeartbeatRequest(job="team-7", rank=0, incarnation=1), timeout=_LONG_S).boot_id
        with pytest.raises(grpc.RpcError) as caught:
            call(pb.HeartbeatRequest(job="theirs", rank=0, incarnation=1), timeout=_LONG_S)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


# ---- what changes while it runs ----


def test_everything_can_be_replaced_while_it_runs(serve: Callable[..., Any], tmp_path: Path) -> None:
    """SIGHUP: nobody who may go on is interrupted, and what can't be used changes nothing."""
    authority, other = Authority(tmp_path / "authority"), Authority(tmp_path / "other")
    log, tokens = tmp_path / "log", tmp_path / "tokens.toml"
    service = serve(*authority.flags(), *_tokens(tokens), "--log-file", str(log))
    ops = _world(service.address, authority.credentials(token="ops-secret"))
    team = _world(service.address, authority.credentials(token="team-secret"), "team-7")

    def reloads(path: Path, content: bytes, said: str) -> None:
        path.write_bytes(content)
        service.signal(signal.SIGHUP)
        _until(log, said)
        ops.barrier()

    # The certificate: first one that is not the key's, then the key.
    for file, said in zip(
        other.issue("server"),
        ("key values mismatch. What was read before stays in use", "certificates: now"),
        strict=True,
    ):
        reloads(tmp_path / "authority" / file.name, file.read_bytes(), said)
    late = _world(service.address, other.credentials(token="team-secret"), "team-8")
    assert "not signed by the CA" in _refused(service.address, authority.credentials(token="team-secret"))

    # The tokens: a broken file, then one without the team's.
    original = tokens.read_bytes()
    reloads(tokens, b"[[token]", "expected TOML")
    for world in (team, late):
        _exchanges(world)
    reloads(tokens, original[original.index(b'[[token]]\nname = "eval"') :], "2 streams ended")
    for world in (team, late):
        with pytest.raises(ServiceError) as caught:
            world.barrier()
        assert str(caught.value) == (
            "The token 'team' was withdrawn, or is not for this job any more. Ask whoever runs the service for another "
            "one, and start the job again."
        )
        world.leave()
    _exchanges(ops)
    ops.leave()


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
