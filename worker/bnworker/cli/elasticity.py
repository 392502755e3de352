"""Whether a job may lose ranks and go on: as options of `bnlayer launch` and `bnlayer train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from bnworker.limits import Limits
from bnworker.train.declaration import Setting, at_least

_ELASTIC = "Elastic jobs"


def _checked(text: str) -> str:
    Limits.parsed(text)
    return text


@dataclass(frozen=True, slots=True)
class Elasticity:
    """How many ranks a job may have, and how often lost ones are started again."""

    elastic: Annotated[
        str | None,
        Setting(
            "When ranks are lost, go on with MIN or more; let others join, up to MAX. The default is to end the job.",
            _ELASTIC,
            metavar="MIN:MAX",
            read=_checked,
        ),
    ] = None
    max_restarts: Annotated[
        int, Setting("With --elastic: how many lost ranks are started again, altogether.", _ELASTIC, at_least(0))
    ] = 3

    @property
    def limits(self) -> Limits | None:
        """For the launcher; None: the job is not elastic."""
        return None if self.elastic is None else Limits.parsed(self.elastic)

    @property
    def given(self) -> dict[str, object]:
        """As options, for launchers on other hosts."""
        return {} if self.elastic is None else {"elastic": self.elastic, "max-restarts": self.max_restarts}
