"""`python -m bnserver`: the statistics service as a process."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from bnlayer.environment import variable
from bnserver.configuration import CONFIG_VARIABLE, SETTINGS, ConfigurationError, resolve

_ABOUT = """\
Run the statistics service: it reduces what the ranks of a training job contribute, and owns the moving mean and
variance of their layers. Many jobs can share it. Stop it with SIGTERM or Ctrl-C: the ranks get an error, and
the jobs are saved. SIGHUP reads certificates and tokens anew.
"""
_EXAMPLES = """\
examples:
  python -m bnserver --listen 127.0.0.1:50051 --state-dir state
      ranks on this machine; what the service owns outlives it
  python -m bnserver --listen 127.0.0.1:0 --ready-file address
      a free port; the file 'address' then says which
  python -m bnserver --listen 0.0.0.0:50051 --state-dir state --tls-cert server.pem --tls-key server-key.pem \\
      --tokens tokens.toml
      ranks on other machines, encrypted, each with a token
  python -m bnserver --listen 0.0.0.0:50051 --state-dir state --insecure
      ranks on other machines, in plain text: on a network of your own only

Each flag is a variable (BNSERVER_STATE_DIR for --state-dir) and a key of --config FILE (state-dir), too; flags beat
variables, which beat the file.

exit codes: 0 after an orderly end; 1 the service could not start, or could not save; 2 wrong arguments
"""
USAGE = 2


def main() -> int:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(
        prog="bnserver", description=_ABOUT, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for setting in SETTINGS:
        default = "" if setting.default in (None, False) else f"; {setting.default} if not given"
        described = f"{setting.help}{default}".replace("%", "%%")
        if setting.is_switch:
            parser.add_argument(setting.flag, action=argparse.BooleanOptionalAction, help=described)
        else:
            parser.add_argument(setting.flag, metavar=setting.metavar, help=described)
    parser.add_argument("--config", metavar="FILE", help="settings in TOML, e.g. state-dir = 'state'")
    parser.add_argument(
        "--print-config", action="store_true", help="print each setting and where it was set, and do nothing else"
    )
    options = vars(parser.parse_args())
    config, show = options.pop("config"), options.pop("print_config")
    flags = {name: None if value is None else str(value) for name, value in options.items()}
    return run(flags, os.environ, config, show=show)


def run(flags: Mapping[str, str | None], environ: Mapping[str, str], config: str | None, *, show: bool) -> int:
    """Settle the configuration, and serve.

    Args:
        flags: name of a setting: what the command line says; None: nothing.
        environ: the variables.
        config: the file of `--config`; None: that of the variable, or none.
        show: print the configuration instead.

    Returns:
        The exit code.
    """
    try:
        resolved = resolve(flags, environ, _file(config or variable(environ, CONFIG_VARIABLE)))
        if show:
            print(resolved)  # noqa: T201 - what was asked for
            resolved.configuration.check()
            return 0
    except ConfigurationError as error:
        print(f"bnserver: {error}", file=sys.stderr)  # noqa: T201 - what a command says on its way out
        return USAGE
    # gRPC writes a line for each handshake that fails, however many a stranger makes: read before its first import.
    if variable(os.environ, "GRPC_VERBOSITY") is None:
        os.environ["GRPC_VERBOSITY"] = "ERROR"
    from bnserver.daemon import serve

    return serve(resolved.configuration)


def _file(path: str | None) -> tuple[Path, str] | None:
    if path is None:
        return None
    try:
        return Path(path), Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "expected UTF-8"
        raise ConfigurationError(f"Can't read {path}: {why}.") from error


if __name__ == "__main__":
    sys.exit(main())
