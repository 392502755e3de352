"""`bnlayer certs` and `bnlayer tokens`, as a user meets them."""

from __future__ import annotations

import ssl
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bnproto.tls import attempt
from bnserver.authorization import parse
from bnserver.certificates import check
from bnworker.cli import main
from support.authorities import Authority


class Command:
    """`bnlayer`, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._monkeypatch.setattr(sys, "argv", ["bnlayer", *map(str, arguments)])
        with pytest.raises(SystemExit) as raised:
            main()
        captured = self._capsys.readouterr()
        code = raised.value.code
        assert code is None or isinstance(code, int)
        return code or 0, captured.out, captured.err


@pytest.fixture
def bnlayer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command."""
    for name in ("CA", "CERT", "KEY"):
        monkeypatch.delenv(f"BNLAYER_TLS_{name}", raising=False)
    return Command(monkeypatch, capsys)


def test_certificates_are_made_and_pass_the_check(bnlayer: Command, tmp_path: Path) -> None:
    """By `certs check`, and by Python's own TLS, for the hosts that were named; keys are their owner's alone."""
    folder = tmp_path / "certificates"
    code, out, _ = bnlayer("certs", "init", folder, "--host", "trainer", "--host", "10.0.0.7")
    assert code == 0
    made = [Path(line) for line in out.split()]
    assert sorted(made) == sorted(folder.iterdir())
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made}
    assert {mode for name, mode in modes.items() if name.endswith("-key.pem")} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    tried = attempt(folder / "server.pem", folder / "server-key.pem", of_server=True)
    assert {"trainer", "10.0.0.7", "localhost", "127.0.0.1"} < set(tried.names)
    attempt(folder / "client.pem", folder / "client-key.pem", of_server=False)
    with pytest.raises(ssl.SSLError, match="purpose"):  # a rank's key makes no service
        attempt(folder / "client.pem", folder / "client-key.pem", of_server=True)
    code, out, _ = bnlayer("certs", "check", folder, "--host", "trainer", "--host", "10.0.0.7")
    assert code == 0
    assert out.splitlines()[1] == (
        f"{folder}/server.pem: CN=bnlayer service, for trainer, localhost, 10.0.0.7, 127.0.0.1, ::1, 364 days left"
    )


def test_nothing_is_replaced_unless_asked_for(bnlayer: Command, tmp_path: Path) -> None:
    """`--renew` keeps the CA, which the ranks trust, and the service's hosts."""
    assert bnlayer("certs", "init", tmp_path) == (
        2,
        "",
        "bnlayer: certs init: expected --host NAME, by which ranks reach the service; e.g. --host trainer.\n",
    )
    assert bnlayer("certs", "init", tmp_path, "--host", "one")[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, err = bnlayer("certs", "init", tmp_path, "--host", "one")
    assert (code, err.startswith(f"bnlayer: certs init: {tmp_path}/ca.pem is there already.")) == (2, True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert bnlayer("certs", "init", tmp_path, "--renew", "--host", "two")[0] == 0
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in before if after[name] == before[name]} == {"ca.pem", "ca-key.pem"}
    assert bnlayer("certs", "check", tmp_path, "--host", "one", "--host", "two")[0] == 0


def test_each_problem_is_reported(tmp_path: Path) -> None:
    """Each by its own words; an intermediate CA is looked through."""
    authority, other = Authority(tmp_path / "a"), Authority(tmp_path / "b")
    certificate, key = authority.issue("server", "*.example")
    now = datetime.now(UTC)

    def wrong(*, ca: Path = authority.ca, of: Path = key, hosts: tuple[str, ...] = (), at: datetime = now) -> list[str]:
        return check(certificate, of, ca, hosts, 14, at)[1]

    assert wrong(hosts=("one.example",)) == []
    assert wrong(hosts=("example", "a.b.example")) == ["is not for example", "is not for a.b.example"]
    assert wrong(of=other.issue("server")[1]) == [f"does not belong to the key in {tmp_path}/b/server-key.pem"]
    (fault,) = wrong(ca=other.ca)
    assert fault.startswith("is not signed by ")
    end = datetime(3000, 1, 1, tzinfo=UTC)  # trustme's
    assert wrong(at=end - timedelta(days=5)) == ["expires in 5 days"]
    expired, by_expired = wrong(at=end + timedelta(days=1))
    assert expired == "has expired on 3000-01-01 00:00 UTC"
    assert by_expired.startswith("is signed by ")
    assert by_expired.endswith(", which has expired")
    assert wrong(at=datetime(1999, 1, 1, tzinfo=UTC))[0].startswith("is not valid before ")
    key.chmod(0o644)
    assert wrong()[0].startswith(
        f"can't be used: {key} holds a secret, and others on this machine may read or change it"
    )


def test_exit_codes_of_a_check(bnlayer: Command, tmp_path: Path) -> None:
    """0: nothing to do; 1: something is wrong; 2: it can't be looked at."""
    authority = Authority(tmp_path / "a")
    certificate, key = authority.issue("server")
    given = ("certs", "check", "--cert", certificate, "--key", key, "--ca", authority.ca)
    assert bnlayer(*given)[0] == 0
    assert bnlayer(*given, "--host", "other")[0] == 1
    assert bnlayer("certs", "check", "--cert", tmp_path / "none")[::2] == (
        2,
        f"bnlayer: certs check: Can't read {tmp_path}/none: No such file or directory.\n",
    )
    assert bnlayer("certs", "check", "--cert", key)[0] == 2
    assert bnlayer("certs", "check")[0] == 2


def test_tokens_are_drawn_and_listed(bnlayer: Command, tmp_path: Path) -> None:
    """The file holds what the service needs to know them again, and not them."""
    path = tmp_path / "tokens.toml"
    _, first, _ = bnlayer("tokens", "add", path, "--name", "a", "--job", "a-*", "--job", "b")
    _, second, _ = bnlayer("tokens", "add", path, "--name", "ops", "--job", "*", "--role", "admin")
    content = path.read_text()
    grants = parse(content)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [(grant.name, grant.jobs, grant.role.name) for grant in grants.grants] == [
        ("a", ("a-*", "b"), "WORKER"),
        ("ops", ("*",), "ADMIN"),
    ]
    for token, grant in zip((first, second), grants.grants, strict=True):
        assert grants.find(token.strip()) is grant
        assert token.strip() not in content
    code, out, err = bnlayer("tokens", "add", path, "--name", "a", "--job", "c")
    assert (code, out) == (2, "")
    assert err == f"bnlayer: tokens add: {path}: token 3 ('a'): expected another name, a token before it has this one\n"
    assert path.read_text() == content
    path.chmod(0o644)
    assert (
        "holds a secret, and others on this machine" in bnlayer("tokens", "add", path, "--name", "c", "--job", "c")[2]
    )
