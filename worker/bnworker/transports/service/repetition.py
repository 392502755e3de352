"""What a rank repeats on its next connection, so that everything counts exactly once.

* What was asked is kept until it is answered, and is asked again on the next connection.
* The latest contribution that was answered is kept, too, and sent again: after a restart of the service another rank
  may lack that answer, and plain operations leave no trace on the service's disk.
* The join says which answers the rank has, so that a service that lost some of them notices.

It knows requests and answers. Which connection they belong to, and whether there is one, `session` knows.
"""

from __future__ import annotations

from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service.events import Requests


class Repetition:
    """One rank's requests and answers so far.

    Attributes:
        answered: the number of the last contribution that was answered.
        asked: what is not answered yet.
    """

    def __init__(self) -> None:
        self.answered = 0
        self.asked: Requests = ()
        self._contributed: Requests = ()
        self._layer_answered = 0
        self._versions: dict[str, int] = {}

    @property
    def requests(self) -> list[pb.ExchangeRequest]:
        """What the service may lack, in order."""
        return [*self._contributed, *self.asked]

    def contribution_answered(self, contribution: pb.Contribution, result: pb.Result) -> None:
        """The contribution that waits was answered."""
        self.answered = result.sequence
        if contribution.HasField("layer"):
            self._layer_answered = result.sequence
            self._versions[contribution.layer] = result.version
        self._contributed = self.asked

    def note_version(self, layer: str, version: int) -> None:
        """A pull or a push was answered with this version of a layer."""
        self._versions[layer] = version

    def resume(self, join: pb.Join, generation: int) -> None:
        """Say in a join which answers the rank has."""
        join.resume.generation = generation
        join.resume.sequence = self.answered
        join.resume.layer_sequence = self._layer_answered
        join.resume.versions.update(self._versions)
