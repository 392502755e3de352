"""Certificates and tokens: what is read, what is refused, and when they are read anew."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from bnserver.admission import Admission
from bnserver.authorization import Grants, Role, TokensError, entry
from bnserver.reloading import Reloading, read_tokens
from bnserver.tls import CertificateError, Certificates, Files, load
from support.authorities import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """A CA."""
    return Authority(tmp_path / "authority")


def test_what_is_known_of_a_certificate(authority: Authority) -> None:
    """For the log; keys are in no text."""
    certificate, key = authority.issue("server", "trainer.example", "10.0.0.7")
    loaded = load(Files(certificate, key, authority.ca))
    assert str(loaded).startswith("for trainer.example, 10.0.0.7, valid until ")
    assert "PRIVATE" not in repr(loaded)
    assert loaded.days_left() > 0


def test_certificates_that_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    """Each is told by its own reason, before a rank meets it."""
    certificate, key = authority.issue("server")
    expired = authority.issue("expired", expired=True)
    other = authority.issue("other")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def why(*files: Path) -> str:
        with pytest.raises(CertificateError) as caught:
            load(Files(*files))
        return str(caught.value)

    assert why(*expired) == (
        f"The certificate in {expired[0]} can't be used: certificate has expired. Make another one, e.g. bnlayer certs "
        "init --renew."
    )
    assert "key values mismatch" in why(certificate, other[1])
    assert f"expected certificates in PEM in {key}" in why(certificate, key, key)
    assert why(certificate, tmp_path / "none") == f"Can't read {tmp_path / 'none'}: No such file or directory."
    assert why(pipe, key) == f"Can't read {pipe}: expected a regular file."
    key.chmod(0o604)
    assert why(certificate, key) == (
        f"{key} holds a secret, and others on this machine may read or change it (mode 0604). Make it yours alone: "
        f"chmod 600 {key}"
    )
    key.chmod(0o640)  # a group's is what Kubernetes and systemd hand out
    load(Files(certificate, key))


def test_a_client_certificate_is_not_for_a_service(authority: Authority, tmp_path: Path) -> None:
    """A mix-up of files is found at the start."""
    certificates = pytest.importorskip("bnserver.certificates")
    certificates.init(tmp_path / "made", ["h"], 1, renew=False)
    load(Files(tmp_path / "made/server.pem", tmp_path / "made/server-key.pem", tmp_path / "made/ca.pem"))
    with pytest.raises(CertificateError, match="can't be used: unsuitable certificate purpose"):
        load(Files(tmp_path / "made/client.pem", tmp_path / "made/client-key.pem"))


def test_tokens_that_cannot_be_used(tmp_path: Path) -> None:
    """The file is named, and what is wrong with it."""
    path = tmp_path / "tokens"
    with pytest.raises(TokensError, match=r"--tokens: Can't read .*: No such file or directory\.$"):
        read_tokens(path)
    path.write_text(entry("a", "t", ["*"], Role.READER))
    path.chmod(0o644)
    with pytest.raises(TokensError, match=r"holds a secret, and others on this machine may read .* \(mode 0644\)"):
        read_tokens(path)
    path.chmod(0o600)
    assert [grant.name for grant in read_tokens(path).grants] == ["a"]
    path.write_bytes(b"\xff")
    with pytest.raises(TokensError, match=r"^--tokens .*: 'utf-8' codec can't decode"):
        read_tokens(path)


def test_files_are_read_anew_once_they_stay_as_they_are(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody may be writing; a file that is gone, or broken, changes nothing."""
    caplog.set_level(logging.INFO, "bnserver")
    certificate, key = authority.issue("server")
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(entry("a", "t", ["*"], Role.READER))
    files = Files(certificate, key)
    certificates, admission = Certificates(load(files)), Admission(read_tokens(tokens))
    reloading = Reloading((files, certificates), (tokens, admission))
    before = certificates.loaded, admission.grants

    assert not asyncio.run(reloading.look(changing=False))
    assert caplog.messages == []
    authority.issue("server")
    tokens.write_text(entry("a", "t", ["*"], Role.READER) + entry("b", "u", ["*"], Role.ADMIN))
    assert asyncio.run(reloading.look(changing=False))
    assert (certificates.loaded, admission.grants) == before
    assert not asyncio.run(reloading.look(changing=True))
    assert certificates.loaded.contents != before[0].contents
    assert [grant.name for grant in admission.grants.grants] == ["a", "b"]
    assert caplog.messages == [
        f"certificates: now {certificates.loaded}; before {before[0]}",
        "tokens: 2 of them; new or changed: 'b'; 0 streams ended",
    ]

    caplog.clear()
    tokens.unlink()
    certificate.write_text("none")
    assert asyncio.run(reloading.look(changing=False))
    assert not asyncio.run(reloading.look(changing=True))
    assert [grant.name for grant in admission.grants.grants] == ["a", "b"]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert all(message.endswith("What was read before stays in use.") for message in caplog.messages)


def test_a_log_of_refusals_stays_short(caplog: pytest.LogCaptureFixture) -> None:
    """However many tokens somebody tries."""
    admission = Admission(Grants([]))
    for number in range(1000):
        admission._log_refusal(f"refused {number}")
    assert caplog.messages == ["refused 0"]
    admission._logged -= 1.0
    admission._log_refusal("refused again")
    assert caplog.messages[1:] == ["refused again (999 more refusals were not logged)"]


def test_a_handshake_asks_for_certificates_once(authority: Authority) -> None:
    """gRPC takes None for: the same as before."""
    files = Files(*authority.issue("server"))
    certificates = Certificates(load(files))
    assert certificates._fetch() is None
    authority.issue("server")
    certificates.replace(load(files))
    assert certificates._fetch() is certificates.loaded.configuration
    assert certificates._fetch() is None
