"""Checkpoints at a statistics service: what a rank checks before it asks for one, and what it is told."""

from __future__ import annotations

import operator
import re
from typing import Protocol, runtime_checkable

from bnlayer.collective import CHECKPOINT, Call, PlainSignature

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # as the service has it: part of a file's name
_MOST_STEP = 2**62


class CheckpointError(RuntimeError):
    """The service did not keep a checkpoint: on every rank. Training can go on; the text says why, and what to do."""


@runtime_checkable
class KeepsCheckpoints(Protocol):
    """A transport with an owner elsewhere, who keeps checkpoints."""

    def checkpoint(self, call: Call) -> str:
        """Have the owner keep its state; returns why it did not, or ""."""


def checked(name: str, step: int) -> PlainSignature:
    """What all ranks must agree on.

    Raises:
        TypeError: step is no integer, or name no text.
        ValueError: the name has other characters, or the step is out of range.
    """
    if not isinstance(name, str):
        raise TypeError(f"checkpoint(name=): expected text, received {name!r}.")
    if not _NAME.fullmatch(name):
        raise ValueError(
            "checkpoint(name=): expected 1 to 100 letters, digits, dots, dashes and underscores, the first a letter or "
            f"a digit, received {name[:60]!r}."
        )
    step = operator.index(step)
    if not 0 <= step <= _MOST_STEP:
        raise ValueError(f"checkpoint(step=): expected 0 to 2^62, received {step}.")
    return PlainSignature(CHECKPOINT, (name, str(step)))
