"""The daemon's configuration: what it can be told, and who told it.

Laws:
1. A setting is declared once, as a field of `Configuration`: its name is the flag, the variable and the key.
2. A flag beats a variable, which beats the file, which beats the default. A variable that is set and empty is not set.
3. Whoever says a thing, it is read from text by the same function, and refused with the same words.
4. Nothing is read here but text and mappings.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bnproto.address import hint, is_loopback, split
from bnserver.core.quotas import Quotas

PREFIX = "BNSERVER_"  # of the variables
CONFIG_VARIABLE = f"{PREFIX}CONFIG"  # names the file

_SETTING = "setting"
_FORMATS = ("text", "json")
_LEVELS = ("debug", "info", "warning", "error")
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_QUOTAS = Quotas()
_YES, _NO = ("true", "1", "yes"), ("false", "0", "no")


class ConfigurationError(ValueError):
    """A setting is unknown, malformed, or at odds with another one; the text says which, and where it was set."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that the daemon can be told.

    Attributes:
        name: of the field, e.g. `state_dir`.
        default: where it is not set; None: nothing.
        read: makes a value of text; raises ValueError with what was expected.
        metavar: of the value; "" for a switch.
        help: what it is for, in one sentence without a full stop.
    """

    name: str
    default: Any
    read: Callable[[str], Any]
    metavar: str
    help: str

    @property
    def key(self) -> str:
        """In a file."""
        return self.name.replace("_", "-")

    @property
    def flag(self) -> str:
        """On the command line."""
        return f"--{self.key}"

    @property
    def variable(self) -> str:
        """In the environment."""
        return f"{PREFIX}{self.name.upper()}"

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return not self.metavar


def _address(text: str) -> str:
    if split(text) is None:
        raise ValueError(f"expected HOST:PORT, such as 127.0.0.1:50051, received {text!r}.{hint(text)}")
    return text


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError(f"expected the name of a file or folder, received {text!r}")
    return Path(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"expected a number of seconds, 0 or more, received {text!r}")
    return seconds


def _days(text: str) -> float:
    try:
        return _seconds(text)
    except ValueError:
        raise ValueError(f"expected a number of days, 0 or more, received {text!r}") from None


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"expected a whole number, 0 or more, received {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"expected a whole number, 1 or more, received {text!r}")
    return int(text)


def _bytes(text: str) -> int:
    number, unit = text[:-3], text[-3:]
    if unit not in _UNITS:
        number, unit = text, ""
    try:
        return _count(number) * _UNITS[unit]
    except ValueError:
        raise ValueError(f"expected a number of bytes, such as 1000000, 512MiB or 2GiB, received {text!r}") from None


def _level(text: str) -> str:
    if text not in _LEVELS:
        raise ValueError(f"expected {', '.join(_LEVELS[:-1])} or {_LEVELS[-1]}, received {text!r}")
    return text


def _format(text: str) -> str:
    if text not in _FORMATS:
        raise ValueError(f"expected {' or '.join(_FORMATS)}, received {text!r}")
    return text


def _switch(text: str) -> bool:
    if text.lower() not in _YES + _NO:
        raise ValueError(f"expected true or false, received {text!r}")
    return text.lower() in _YES


def _setting(read: Callable[[str], Any], metavar: str, meaning: str) -> dict[str, Any]:
    return {_SETTING: (read, metavar, meaning)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """The daemon's settings; the attributes are described by what `--help` says of them."""

    listen: str = field(
        default="127.0.0.1:50051",
        metadata=_setting(_address, "HOST:PORT", "where ranks connect; port 0 takes a free one"),
    )
    state_dir: Path | None = field(
        default=None,
        metadata=_setting(
            _path,
            "DIR",
            "where jobs are kept: kill the service, start it again: they go on; without it they end with the process",
        ),
    )
    keep_jobs_days: float | None = field(
        default=None,
        metadata=_setting(_days, "DAYS", "forget jobs that have been over for longer; all are kept if it is not set"),
    )
    keep_jobs: int | None = field(
        default=None,
        metadata=_setting(
            _number,
            "NUMBER",
            "forget jobs that are over beyond the latest so many; all are kept if it is not set",
        ),
    )
    keep_checkpoints: int | None = field(
        default=None,
        metadata=_setting(
            _count, "N", "delete the checkpoints of a job beyond the latest so many; all are kept if it is not set"
        ),
    )
    tls_cert: Path | None = field(
        default=None,
        metadata=_setting(
            _path, "FILE", "the service's certificate, in PEM: connections are encrypted, and ranks know it by that"
        ),
    )
    tls_key: Path | None = field(default=None, metadata=_setting(_path, "FILE", "the key of that certificate"))
    tls_client_ca: Path | None = field(
        default=None,
        metadata=_setting(_path, "FILE", "certificates of CAs: a rank needs a certificate that one of them signed"),
    )
    tokens: Path | None = field(
        default=None,
        metadata=_setting(_path, "FILE", "tokens, with the jobs and the role that each is for: a rank must show one"),
    )
    insecure: bool = field(
        default=False,
        metadata=_setting(
            _switch,
            "",
            "allow plain text, or encryption without a check of who joins, on an address that other machines can reach",
        ),
    )
    lease: float = field(
        default=5.0,
        metadata=_setting(
            _seconds,
            "SECONDS",
            "a rank that gives no sign of life for so long is taken for frozen, and the others get an error; 0: never",
        ),
    )
    away: float = field(
        default=0.5,
        metadata=_setting(
            _seconds,
            "SECONDS",
            "how long a rank whose connection broke may take to come back; a killed one is reported so much later",
        ),
    )
    metrics: str | None = field(
        default=None,
        metadata=_setting(
            _address,
            "HOST:PORT",
            "where Prometheus reads metrics, at /metrics; with the service's certificate and tokens, where it has some",
        ),
    )
    dashboard: str | None = field(
        default=None,
        metadata=_setting(
            _address, "HOST:PORT", "where a browser sees jobs, layers and ranks; with the same certificate and tokens"
        ),
    )
    max_connections: int = field(
        default=_QUOTAS.connections,
        metadata=_setting(_count, "N", "quota: connections open at a time"),
    )
    max_jobs: int = field(
        default=_QUOTAS.jobs,
        metadata=_setting(_count, "N", "quota: jobs that ranks take part in at a time"),
    )
    max_ranks: int = field(default=_QUOTAS.ranks, metadata=_setting(_count, "N", "quota: ranks of a job"))
    max_layers: int = field(default=_QUOTAS.layers, metadata=_setting(_count, "N", "quota: layers of a job"))
    max_channels: int = field(
        default=_QUOTAS.channels,
        metadata=_setting(_count, "N", "quota: channels of a layer; 131072 of them hold up every job for 0.15 s"),
    )
    max_layer_bytes: int = field(
        default=_QUOTAS.layer_bytes,
        metadata=_setting(_bytes, "BYTES", "quota: bytes of the statistics and grids of all layers of a job together"),
    )
    max_checkpoints: int = field(
        default=_QUOTAS.checkpoints, metadata=_setting(_count, "N", "quota: checkpoints of a job")
    )
    max_job_bytes: int = field(
        default=_QUOTAS.job_bytes,
        metadata=_setting(
            _bytes, "BYTES", "quota: bytes of a job's requests that are not answered yet; also as 512MiB"
        ),
    )
    max_bytes: int = field(
        default=_QUOTAS.total_bytes,
        metadata=_setting(_bytes, "BYTES", "quota: likewise, of all jobs together"),
    )
    reflection: bool = field(
        default=False, metadata=_setting(_switch, "", "answer questions about the methods (gRPC server reflection)")
    )
    ready_file: Path | None = field(
        default=None, metadata=_setting(_path, "PATH", "gets the address once ranks can join")
    )
    log_level: str = field(
        default="info", metadata=_setting(_level, "LEVEL", "what is said on stderr: debug, info, warning or error")
    )
    log_format: str = field(
        default="text", metadata=_setting(_format, "FORMAT", "how it is said: text, or json, an object a line")
    )
    log_file: Path | None = field(
        default=None,
        metadata=_setting(_path, "PATH", "gets the log too, from info on whatever the level for stderr is"),
    )

    @property
    def quotas(self) -> Quotas:
        """How much one job may use, and all together."""
        return Quotas(
            connections=self.max_connections,
            jobs=self.max_jobs,
            ranks=self.max_ranks,
            layers=self.max_layers,
            channels=self.max_channels,
            layer_bytes=self.max_layer_bytes,
            checkpoints=self.max_checkpoints,
            job_bytes=self.max_job_bytes,
            total_bytes=self.max_bytes,
        )

    def check(self) -> None:
        """Make sure that the settings go together, and that no port is open to others by mistake.

        Raises:
            ConfigurationError: they don't.
        """
        if (self.tls_cert is None) != (self.tls_key is None):
            there, missing = ("cert", "key") if self.tls_key is None else ("key", "cert")
            raise ConfigurationError(f"--tls-{there} is given, but --tls-{missing} is not: give both, or neither.")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigurationError(
                "--tls-client-ca is given, but --tls-cert is not: ranks show a certificate only where the service has "
                "one. Give --tls-cert and --tls-key."
            )
        for address in filter(None, (self.listen, self.metrics, self.dashboard)):
            self._refuse_open(address)

    def _refuse_open(self, address: str) -> None:
        """Make sure that not everybody gets in at an address."""
        parts = split(address)
        assert parts is not None
        if self.insecure or is_loopback(parts[0]):
            return
        if self.tls_cert is None:
            raise ConfigurationError(
                f"{address} is reachable from other machines, and without --tls-cert and --tls-key everything "
                "crosses the network in plain text. bnlayer certs init makes certificates. Or listen on 127.0.0.1, or "
                "say --insecure if the network is your own."
            )
        if self.tls_client_ca is None and self.tokens is None:
            raise ConfigurationError(
                f"{address} is reachable from other machines, and without --tokens or --tls-client-ca everybody "
                "who reaches it may join every job. Give one of them, or say --insecure if the network is your own."
            )


SETTINGS: tuple[Setting, ...] = tuple(
    Setting(declared.name, declared.default, *declared.metadata[_SETTING]) for declared in fields(Configuration)
)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration, and who said what.

    Attributes:
        configuration: of the daemon.
        sources: name of a setting: where it was set.
    """

    configuration: Configuration
    sources: Mapping[str, str]

    def __str__(self) -> str:
        """A file for `--config` that says the same, with where each setting was made."""
        lines = []
        for setting in SETTINGS:
            value = getattr(self.configuration, setting.name)
            if value is None:
                lines.append(f"# {setting.key} is not set")
            else:
                lines.append(f"{setting.key} = {_toml(value)}  # {self.sources[setting.name]}")
        return "\n".join(lines)


def resolve(flags: Mapping[str, str | None], environ: Mapping[str, str], file: tuple[Path, str] | None) -> Resolved:
    """Settle every setting.

    Args:
        flags: name of a setting: what the command line says; None: nothing.
        environ: the variables.
        file: its path and content; None: there is none.

    Raises:
        ConfigurationError: a setting is invalid.
    """
    from bnlayer.environment import variable  # here, since it imports NumPy, which `--help` needs not

    keys = _keys(*file) if file is not None else {}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in SETTINGS:
        candidates = (
            (flags.get(setting.name), setting.flag),
            (variable(environ, setting.variable), setting.variable),
            (keys.get(setting.key), f"{file[0]}: {setting.key}" if file is not None else ""),
        )
        text, source = next((pair for pair in candidates if pair[0] is not None), (None, "default"))
        sources[setting.name] = source
        if text is None:
            continue
        try:
            values[setting.name] = setting.read(text)
        except ValueError as error:
            raise ConfigurationError(f"{source}: {str(error).rstrip('.')}.") from None
    return Resolved(Configuration(**values), sources)


def _keys(path: Path, content: str) -> dict[str, str]:
    """What a file says, as on the command line."""
    try:
        table = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: expected TOML: {error}.") from None
    keys = [setting.key for setting in SETTINGS]
    for key, value in table.items():
        if key not in keys:
            near = difflib.get_close_matches(key.replace("_", "-"), keys, n=1)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(f"{path}: unknown key {key!r}.{guess} Known are {', '.join(keys)}.")
        if not isinstance(value, str | int | float):
            raise ConfigurationError(f"{path}: {key}: expected a string, a number or a boolean, received {value!r}.")
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in table.items()}


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in str(value))
    return f'"{escaped}"'
