"""Credentials: what the environment says, and what is never sent, shown or crashed on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bnproto.connection import Connector
from bnproto.credentials import NONE, Credentials, CredentialsError, credentials
from bnproto.v1 import statistics_pb2 as pb
from bnproto.v1 import statistics_pb2_grpc as rpc
from support.authorities import Authority

HERE, THERE = "127.0.0.1:1", "trainer:1"


def test_credentials_from_the_environment() -> None:
    """An argument beats the variables; an empty variable is unset."""
    assert credentials({"BNLAYER_TOKEN": "", "BNLAYER_TLS_CA": ""}, "") == NONE
    assert credentials({"BNLAYER_TOKEN": "t"}).token == "t"
    assert credentials({"BNLAYER_TOKEN": "t", "BNLAYER_TOKEN_FILE": "f"}, "u") == Credentials("u")
    variables = {f"BNLAYER_TLS_{name}": name for name in ("CA", "CERT", "KEY")}
    assert credentials({**variables, "BNLAYER_TOKEN_FILE": "f", "BNLAYER_INSECURE": "1"}) == Credentials(
        None, Path("f"), Path("CA"), Path("CERT"), Path("KEY"), insecure=True
    )


@pytest.mark.parametrize(
    ("environ", "error"),
    [
        ({"BNLAYER_TOKEN": "t", "BNLAYER_TOKEN_FILE": "f"}, "BNLAYER_TOKEN and BNLAYER_TOKEN_FILE are both set: unset"),
        ({"BNLAYER_TLS_CERT": "c"}, "BNLAYER_TLS_CERT is set, but BNLAYER_TLS_KEY is not: set both, or neither."),
        ({"BNLAYER_TLS_KEY": "k"}, "BNLAYER_TLS_KEY is set, but BNLAYER_TLS_CERT is not: set both, or neither."),
        ({"BNLAYER_TLS_KEY": "k", "BNLAYER_TLS_CERT": "c"}, "BNLAYER_TLS_CERT is set, but BNLAYER_TLS_CA is not: set"),
        ({"BNLAYER_INSECURE": "yes"}, "BNLAYER_INSECURE: expected 0 or 1, received 'yes'."),
        ({"BNLAYER_TOKEN": "my secret"}, "BNLAYER_TOKEN: expected a token of 1 to 512 letters, digits and ._~+/-, "),
    ],
)
def test_what_does_not_go_together(environ: dict[str, str], error: str) -> None:
    """Said before anything is connected; a token is not shown."""
    with pytest.raises(CredentialsError, match="^" + re.escape(error)) as caught:
        credentials(environ)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("shown", [Credentials("s3cret"), Credentials(token_file=Path("f"))])
def test_a_token_stays_on_this_machine_in_plain_text(shown: Credentials) -> None:
    """Whoever listens on the way could use it; the user may say that nobody does."""
    for address in (HERE, "[::1]:1", "localhost:1"):
        shown.check(address)
    with pytest.raises(CredentialsError) as caught:
        shown.check(THERE)
    assert str(caught.value) == (
        "The token would cross the network to trainer:1 in plain text. Set BNLAYER_TLS_CA to the certificate of the "
        "service's CA; or, if the network is your own and the service runs with --insecure, BNLAYER_INSECURE=1."
    )
    assert "s3cret" not in repr(shown)
    for other in (
        Credentials(shown.token, shown.token_file, ca=Path("ca")),
        Credentials(shown.token, shown.token_file, insecure=True),
        NONE,
    ):
        other.check(THERE)


def test_files_are_read_before_anything_is_connected(tmp_path: Path) -> None:
    """A file that is none of its kind is named, with its variable."""
    authority = Authority(tmp_path / "authority")
    token, nothing = tmp_path / "token", tmp_path / "nothing"
    certificate, key = authority.issue("rank")
    token.write_text("abc\n")

    def why(shown: Credentials) -> str:
        with pytest.raises(CredentialsError) as caught:
            Connector(HERE, shown)
        return str(caught.value)

    token.chmod(0o644)
    assert why(Credentials(token_file=token)).startswith(f"BNLAYER_TOKEN_FILE: {token} holds a secret, and others on")
    token.chmod(0o600)
    Connector(HERE, Credentials(token_file=token))
    token.write_text("a b\n")
    assert why(Credentials(token_file=token)).startswith(f"BNLAYER_TOKEN_FILE={token}: expected a token of 1 to 512")
    assert why(Credentials(ca=nothing)) == (
        f"BNLAYER_TLS_CA: expected certificates in PEM in {nothing}: No such file or directory."
    )
    assert why(Credentials(ca=token)).startswith(f"BNLAYER_TLS_CA: expected certificates in PEM in {token}: ")
    assert why(Credentials(ca=authority.ca, certificate=certificate, key=token)).startswith(
        f"BNLAYER_TLS_CERT and BNLAYER_TLS_KEY: expected a certificate in PEM in {certificate} and its key, without a "
    )
    key.chmod(0o644)
    assert why(authority.credentials((certificate, key))).startswith(f"BNLAYER_TLS_KEY: {key} holds a secret, and ")


def test_a_renewal_in_progress_does_not_stop_a_rank_that_comes_back(tmp_path: Path) -> None:
    """A file that is half written, or gone for a moment: what was read before may still be good."""
    authority = Authority(tmp_path / "authority")
    connector = Connector(HERE, authority.credentials())
    authority.ca.write_text("half a cert")
    connector.channel().close()


def test_a_closed_channel_is_an_error() -> None:
    """Heartbeats may be sent while another thread closes it; with gRPC's own interceptors it ended the process."""
    channel = Connector(HERE, Credentials("t")).channel()
    stub = rpc.StatisticsServiceStub(channel)
    channel.close()
    with pytest.raises(ValueError, match=r"(?i)channel closed|closed channel"):
        stub.Heartbeat.future(pb.HeartbeatRequest())
    with pytest.raises(ValueError, match=r"(?i)channel closed|closed channel"):
        stub.Exchange(iter([]))
