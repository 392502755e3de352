"""`python -m bnserver`: the statistics service as a process."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from bnserver.core.members import LivenessTimeouts
from bnserver.daemon import serve

_ABOUT = """\
Run the statistics service: it reduces what the ranks of a training job contribute, and owns the moving mean and
variance of their layers. Many jobs can share it. Stop it with SIGTERM or Ctrl-C: the ranks are told, the jobs saved.
"""
_EXAMPLES = """\
examples:
  python -m bnserver --listen 127.0.0.1:50051 --state-dir state
      ranks on this machine; what the service owns outlives it
  python -m bnserver --listen 127.0.0.1:0 --ready-file address
      a free port; the file 'address' then says which
  python -m bnserver --listen 0.0.0.0:50051 --state-dir state --insecure
      ranks on other machines, in plain text: on a network of your own only

exit codes: 0 after an orderly end; 1 the service could not start, or could not save; 2 wrong arguments
"""


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 or more, received {text!r}")
    return seconds


def main() -> int:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(
        prog="bnserver",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--listen", required=True, metavar="HOST:PORT", help="where ranks connect; port 0 takes a free one"
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="where jobs are kept: kill the service and start it again, and they go on; without it they end with the "
        "process",
    )
    parser.add_argument(
        "--lease",
        type=_seconds,
        default=LivenessTimeouts().lease,
        metavar="SECONDS",
        help="a rank that gives no sign of life for so long is taken for frozen, and the others are told; 0: never; "
        "%(default)g if not given",
    )
    parser.add_argument(
        "--away",
        type=_seconds,
        default=LivenessTimeouts().away,
        metavar="SECONDS",
        help="how long a rank whose connection broke may take to come back; a killed one is told to the others so much "
        "later; %(default)g if not given",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="allow plain text on an address that other machines can reach"
    )
    parser.add_argument(
        "--ready-file", type=Path, metavar="PATH", help="write the address to this file once ranks can join"
    )
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default="info",
        help="what is said on stderr; %(default)s if not given",
    )
    parser.add_argument(
        "--log-file", type=Path, metavar="PATH", help="write the log to this file too, from info on whatever the level"
    )
    options = parser.parse_args()
    return serve(
        options.listen,
        options.state_dir,
        insecure=options.insecure,
        ready_file=options.ready_file,
        timeouts=LivenessTimeouts(options.lease, options.away),
        log_level=options.log_level,
        log_file=options.log_file,
    )


if __name__ == "__main__":
    sys.exit(main())
