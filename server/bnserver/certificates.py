"""Certificates for a service and its ranks: made, and looked at. Needs the package `cryptography`.

One authority (CA) signs a certificate for the service and one for the ranks. Keys are on the curve P-256, and readable
by their owner alone.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bnproto.private_files import PrivateFileError, read_private, read_public

# A service that is reached by its health check, by a tunnel or by ranks on its own machine has these names, too.
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CA_DAYS = 3650
_CLOCK_SKEW = timedelta(minutes=5)  # between the machine that signs and those that verify

_PUBLIC, _PRIVATE = 0o644, 0o600


class CertificateFilesError(ValueError):
    """Certificates can't be made or read; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def init(folder: Path, hosts: Sequence[str], days: int, *, renew: bool) -> list[Path]:
    """Make a CA, and a certificate for the service and one for its ranks.

    Args:
        folder: gets ca.pem, server.pem and client.pem, and the key of each in NAME-key.pem.
        hosts: names and addresses by which ranks reach the service.
        days: that the two certificates are valid; the CA's is for ten years.
        renew: use the CA that is in the folder, and replace the two; the service's keeps its hosts.

    Returns:
        The files that were written.

    Raises:
        CertificateFilesError: there are some already; or with `renew`, there is no CA.
    """
    ca_files, others = _files(folder, "ca"), [*_files(folder, "server"), *_files(folder, "client")]
    written: list[tuple[Path, bytes, int]] = []
    if renew:
        authority = _read_pair(*ca_files)
        hosts = [*names_of(_read_certificates(others[0])[0]), *hosts]
    else:
        there = [path for path in (*ca_files, *others) if path.exists()]
        if there:
            raise CertificateFilesError(
                f"{there[0]} is there already. Name another folder; or --renew: new certificates for service and "
                "ranks, from the CA that is there."
            )
        authority = _make_authority()
        written += _contents(ca_files, authority)
    names = list(dict.fromkeys((*hosts, *LOOPBACK)))
    for name, pair in (
        ("server", _issue(authority, "bnlayer service", names, days, ExtendedKeyUsageOID.SERVER_AUTH)),
        ("client", _issue(authority, "bnlayer rank", [], days, ExtendedKeyUsageOID.CLIENT_AUTH)),
    ):
        written += _contents(_files(folder, name), pair)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, content, mode in written:
            _replace(path, content, mode)
    except OSError as error:
        raise CertificateFilesError(f"Can't write to {folder}: {error.strerror}.") from error
    return [path for path, _, _ in written]


def check(
    certificate: Path, key: Path | None, ca: Path | None, hosts: Sequence[str], soon_days: int, now: datetime
) -> tuple[str, list[str]]:
    """Look at a certificate.

    Args:
        certificate: its file.
        key: the file of its key; None: not looked at.
        ca: the CA that should have signed it; None: not looked at.
        hosts: names that it should be for.
        soon_days: an end within so many is reported.
        now: the time.

    Returns:
        What it is, in one line; and what is wrong with it.

    Raises:
        CertificateFilesError: a file can't be read.
    """
    chain = _read_certificates(certificate)
    leaf = chain[0]
    names = names_of(leaf)
    left = (leaf.not_valid_after_utc - now).days
    what = f"{_subject(leaf)}, for {', '.join(names) or 'no host'}, {left} days left"
    wrong: list[str] = []
    if now < leaf.not_valid_before_utc:
        wrong.append(f"is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    if now > leaf.not_valid_after_utc:
        wrong.append(f"has expired on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    elif left < soon_days:
        wrong.append(f"expires in {left} days")
    wrong += [f"is not for {host}" for host in hosts if not _covers(names, host)]
    if ca is not None:
        wrong += _chain_faults(chain, _read_certificates(ca), now)
    if key is not None:
        try:
            if _read_key(key).public_key() != leaf.public_key():
                wrong.append(f"does not belong to the key in {key}")
        except CertificateFilesError as error:
            wrong.append(f"can't be used: {error}")
    return what, wrong


def names_of(certificate: x509.Certificate) -> list[str]:
    """The hosts and addresses that a certificate is for."""
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    hosts = alternatives.get_values_for_type(x509.DNSName)
    return [*hosts, *map(str, alternatives.get_values_for_type(x509.IPAddress))]


def _covers(names: Sequence[str], host: str) -> bool:
    first, dot, rest = host.lower().partition(".")
    return host.lower() in map(str.lower, names) or bool(first and dot and f"*.{rest}" in map(str.lower, names))


def _chain_faults(
    chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate], now: datetime
) -> list[str]:
    """What is wrong between a certificate and its CA."""
    current, between = chain[0], list(chain[1:])
    while True:
        for authority in authorities:
            if _signed(current, authority):
                if now > authority.not_valid_after_utc:
                    return [f"is signed by {_subject(authority)}, which has expired"]
                return []
        following = next((one for one in between if _signed(current, one)), None)
        if following is None:
            return [
                f"is not signed by {', '.join(map(_subject, authorities))}, but by {current.issuer.rfc4514_string()}"
            ]
        between.remove(following)
        current = following


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _make_authority() -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bnlayer CA")])
    builder = _builder(name, name, key, CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Pair(builder.sign(key, hashes.SHA256()), key)


def _issue(authority: Pair, name: str, hosts: Sequence[str], days: int, purpose: x509.ObjectIdentifier) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, authority.certificate.subject, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_name, hosts))), critical=False)
    return Pair(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    begin = datetime.now(UTC) - _CLOCK_SKEW
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise CertificateFilesError(f"--host: expected a host's name or address, received {host!r}.") from error


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{name}.pem", folder / f"{name}-key.pem"


def _contents(files: tuple[Path, Path], pair: Pair) -> list[tuple[Path, bytes, int]]:
    key = pair.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # The key first: a daemon that looks at its files while they are replaced waits until they stay the same.
    return [
        (files[1], key, _PRIVATE),
        (files[0], pair.certificate.public_bytes(serialization.Encoding.PEM), _PUBLIC),
    ]


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file that is there whole or not at all, and never readable by more than `mode` says."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    draft.replace(path)


def _read_pair(certificate: Path, key: Path) -> Pair:
    return Pair(_read_certificates(certificate)[0], _read_key(key))


def _read_certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(read_public(path))
    except PrivateFileError as error:
        raise CertificateFilesError(str(error)) from error
    except ValueError as error:
        raise CertificateFilesError(f"{path}: expected certificates in PEM.") from error


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(read_private(path), None)
    except PrivateFileError as error:
        raise CertificateFilesError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise CertificateFilesError(f"{path}: expected a key in PEM, without a password.") from error
    return key  # type: ignore[return-value]  # only its public key is asked of one that is of another kind


def _subject(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or "a certificate without a subject"
