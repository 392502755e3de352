"""Tokens and certificates: neither is supported yet, so a process that is given one is refused.

A token that is accepted and never checked looks like protection, and crosses the network in plain text.
"""

from __future__ import annotations

from collections.abc import Mapping

from bnlayer.environment import variable

_VARIABLES = {
    "BNLAYER_TOKEN": "authentication",
    "BNLAYER_TOKEN_FILE": "authentication",
    "BNLAYER_TLS_CA": "encryption (TLS)",
    "BNLAYER_TLS_CERT": "encryption (TLS)",
    "BNLAYER_TLS_KEY": "encryption (TLS)",
}


def refusal(environ: Mapping[str, str], token: str | None = None) -> str | None:
    """Why a process can't be started or joined with these credentials; None where there are none.

    Args:
        environ: the variables; an empty one is unset.
        token: an argument of `join`; an empty one is none.
    """
    if token:
        return _unavailable("token= was given", "authentication", "Remove token=")
    for name, what in _VARIABLES.items():
        if variable(environ, name) is not None:
            return _unavailable(f"{name} is set", what, f"Unset {name}")
    return None


def _unavailable(given: str, what: str, remedy: str) -> str:
    return (
        f"{given}, but {what} is not available yet in this version. {remedy}, and don't send secrets over plain text: "
        "keep the service on loopback, or on a network of your own."
    )
