"""How many ranks a run has, and how they reach each other: as options of a command."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from bnworker.train.declaration import Setting, at_least

_RANKS = "Ranks"


class TrainTransport(StrEnum):
    """How the ranks reach each other."""

    service = "service"
    mpi = "mpi"
    none = "none"


@dataclass(frozen=True, slots=True)
class Ranks:
    """Of `bnlayer train`: what the launcher of a run needs to know; it is not passed on to the ranks."""

    workers: Annotated[
        int | None, Setting("How many processes, on each host; 1 if not given.", _RANKS, at_least(1))
    ] = None
    transport: Annotated[
        TrainTransport | None,
        Setting(
            "`service` (the default), `mpi`, or `none`: unsynchronized replicas, each on its part of the rows.", _RANKS
        ),
    ] = None
    address: Annotated[
        str | None,
        Setting(
            "Of a running service; without it one is started for this run.",
            _RANKS,
            metavar="HOST:PORT",
            environ="BNLAYER_ADDRESS",
        ),
    ] = None
    job: Annotated[str | None, Setting("The job's name; fresh if not given.", _RANKS, environ="BNLAYER_JOB")] = None


@dataclass(frozen=True, slots=True)
class RanksOfOnePass:
    """Of `bnlayer evaluate` and `calibrate`."""

    workers: Annotated[int | None, Setting("How many processes; 1 if not given.", accepted=at_least(1))] = None
    transport: Annotated[TrainTransport, Setting("As of `bnlayer train`.")] = TrainTransport.service
    address: Annotated[
        str | None,
        Setting("Of a running service; else one is started.", metavar="HOST:PORT", environ="BNLAYER_ADDRESS"),
    ] = None
