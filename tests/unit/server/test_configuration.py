"""The daemon's configuration: who says what, and whose word counts."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from bnserver.configuration import SETTINGS, Configuration, ConfigurationError, resolve
from bnserver.core.quotas import Quotas

FILE = Path("service.toml")


def test_a_flag_beats_a_variable_which_beats_the_file() -> None:
    """And each says who said it."""
    file = (FILE, 'lease = 1\naway = 1.5\nlisten = "127.0.0.1:1"\ninsecure = true\n')
    environ = {"BNSERVER_LEASE": "2", "BNSERVER_AWAY": "2", "BNSERVER_LISTEN": "", "BNSERVER_STATE_DIR": "kept"}
    resolved = resolve({"lease": "3", "away": None}, environ, file)
    assert resolved.configuration == Configuration(
        lease=3.0, away=2.0, listen="127.0.0.1:1", insecure=True, state_dir=Path("kept")
    )
    sources = {name: source for name, source in resolved.sources.items() if source != "default"}
    assert sources == {
        "lease": "--lease",
        "away": "BNSERVER_AWAY",
        "listen": "service.toml: listen",
        "insecure": "service.toml: insecure",
        "state_dir": "BNSERVER_STATE_DIR",
    }


def test_what_is_printed_is_a_file_that_says_the_same() -> None:
    """`--print-config > service.toml`, whatever stands in a path."""
    resolved = resolve(
        {"state_dir": 'odd"\\name\n', "lease": "0.25", "keep_jobs": "3"}, {"BNSERVER_INSECURE": "yes"}, None
    )
    second = resolve({}, {}, (FILE, str(resolved)))
    assert second.configuration == resolved.configuration
    assert "lease = 0.25  # --lease" in str(resolved)
    assert "keep-jobs = 3  # --keep-jobs" in str(resolved)
    assert "max-job-bytes = 2147483648  # default" in str(resolved)
    assert "# tokens is not set" in str(resolved)


def test_every_setting_says_the_same_in_three_ways() -> None:
    """One name, three spellings; the default is what nobody says."""
    assert resolve({}, {}, None).configuration == Configuration()
    texts = {
        "HOST:PORT": "h:1",
        "SECONDS": "7",
        "DAYS": "7",
        "NUMBER": "7",
        "N": "7",
        "BYTES": "7MiB",
        "LEVEL": "error",
        "FORMAT": "json",
        "": "true",
    }
    for setting in SETTINGS:
        text = texts.get(setting.metavar, "x")
        (quoted,) = tomllib.loads(f'{setting.key} = "{text}"').values()
        by = [
            resolve({setting.name: text}, {}, None),
            resolve({}, {setting.variable: text}, None),
            resolve({}, {}, (FILE, f'{setting.key} = "{quoted}"')),
        ]
        assert len({repr(one.configuration) for one in by}) == 1
        assert by[0].configuration != Configuration()


@pytest.mark.parametrize(
    ("key", "text", "error"),
    [
        ("listen", "::1:0", "expected HOST:PORT, such as 127.0.0.1:50051, received '::1:0'. An IPv6 host stands in"),
        ("lease", "soon", "expected a number of seconds, 0 or more, received 'soon'."),
        ("keep-jobs-days", "-1", "expected a number of days, 0 or more, received '-1'."),
        ("keep-jobs", "1.5", "expected a whole number, 0 or more, received '1.5'."),
        ("log-level", "loud", "expected debug, info, warning or error, received 'loud'."),
        ("log-format", "xml", "expected text or json, received 'xml'."),
        ("insecure", "maybe", "expected true or false, received 'maybe'."),
        ("max-jobs", "0", "expected a whole number, 1 or more, received '0'."),
        ("max-bytes", "2GB", "expected a number of bytes, such as 1000000, 512MiB or 2GiB, received '2GB'."),
        ("tokens", "a\0b", "expected the name of a file or folder, received 'a\\x00b'."),
    ],
)
def test_a_wrong_value_names_who_said_it(key: str, text: str, error: str) -> None:
    """The same words, whoever it was."""
    name = key.replace("-", "_")
    said: list[tuple[str, dict[str, str], dict[str, str], tuple[Path, str] | None]] = [
        (f"--{key}", {name: text}, {}, None),
        (f"BNSERVER_{name.upper()}", {}, {f"BNSERVER_{name.upper()}": text}, None),
    ]
    if "\0" not in text:
        said.append((f"service.toml: {key}", {}, {}, (FILE, f'{key} = "{text}"')))
    for source, flags, environ, file in said:
        with pytest.raises(ConfigurationError, match="^" + re.escape(f"{source}: {error}")):
            resolve(flags, environ, file)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("lease 1", "service.toml: expected TOML: "),
        (
            "state_dir = 'x'",
            "service.toml: unknown key 'state_dir'. Did you mean 'state-dir'? Known are",
        ),
        ("config = 'x'", "service.toml: unknown key 'config'. "),
        ("lease = [1]", "service.toml: lease: expected a string, a number or a boolean, received [1]."),
    ],
)
def test_a_wrong_file(content: str, error: str) -> None:
    """A key that nobody knows is a slip of the pen, not a setting."""
    with pytest.raises(ConfigurationError, match="^" + re.escape(error)):
        resolve({}, {}, (FILE, content))


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"listen": "0.0.0.0:1"}, "0.0.0.0:1 is reachable from other machines, and without --tls-cert and --tls-key "),
        ({"listen": "[::]:1", "tokens": "t"}, "[::]:1 is reachable from other machines, and without --tls-cert and "),
        (
            {"listen": "0.0.0.0:1", "tls_cert": "c", "tls_key": "k"},
            "0.0.0.0:1 is reachable from other machines, and without --tokens or --tls-client-ca everybody who reaches",
        ),
        ({"tls_cert": "c"}, "--tls-cert is given, but --tls-key is not: give both, or neither."),
        ({"tls_key": "k"}, "--tls-key is given, but --tls-cert is not: give both, or neither."),
        ({"tls_client_ca": "a"}, "--tls-client-ca is given, but --tls-cert is not: "),
        ({"listen": "0.0.0.0:1", "insecure": "true"}, None),
        ({"listen": "0.0.0.0:1", "tls_cert": "c", "tls_key": "k", "tokens": "t"}, None),
        ({"listen": "0.0.0.0:1", "tls_cert": "c", "tls_key": "k", "tls_client_ca": "a"}, None),
        ({"listen": "[::1]:1"}, None),
        ({"listen": "localhost:1", "tokens": "t"}, None),
    ],
)
def test_nobody_is_let_in_by_mistake(said: dict[str, str], error: str | None) -> None:
    """Beyond this machine: encrypted, and with a check of who joins; or the operator says that the network is safe."""
    configuration = resolve(said, {}, None).configuration
    if error is None:
        configuration.check()
        return
    with pytest.raises(ConfigurationError, match="^" + re.escape(error)):
        configuration.check()


def test_quotas_are_settings() -> None:
    """Each by a setting of its own."""
    said = {"max_connections": "1", "max_jobs": "2", "max_ranks": "3", "max_layers": "4", "max_channels": "5"}
    quotas = resolve({**said, "max_job_bytes": "6KiB", "max_bytes": "7"}, {}, None).configuration.quotas
    assert quotas == Quotas(connections=1, jobs=2, ranks=3, layers=4, channels=5, job_bytes=6 * 2**10, total_bytes=7)
    assert Configuration().quotas == Quotas()
