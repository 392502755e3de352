"""What a rank keeps across connections to the service, so that it can go on where it was after one breaks.

Laws:
1. A request is kept until it is answered, and sent again on the next connection.
2. The latest answered contribution is kept, too, and sent again: after a restart of the service another rank may lack
   that answer, and plain operations are not in the service's journal.
3. An answer counts once.
"""

from __future__ import annotations

from bnproto.v1 import statistics_pb2 as pb


class Memory:
    """One rank's session state.

    Args:
        join: its join request.

    Attributes:
        generation: that it is in; 0 before all ranks have joined.
        answered: the number of the last contribution that was answered.
        versions: the owner's version of each layer, as of the last answer.
        asked: what is not answered yet: a request, and the parts of its payload.
    """

    def __init__(self, join: pb.Join) -> None:
        self.generation = 0
        self.answered = 0
        self.versions: dict[str, int] = {}
        self.asked: list[pb.ExchangeRequest] = []
        self._join = join
        self._boot_id = 0
        self._layer_answered = 0
        self._contributed: list[pb.ExchangeRequest] = []

    def asks(self, requests: list[pb.ExchangeRequest]) -> None:
        """Keep a request, and the parts of its payload."""
        self.asked = requests

    @property
    def leaves(self) -> bool:
        """Whether it has sent its leave."""
        return bool(self.asked) and self.asked[0].HasField("leave")

    def hears(self, response: pb.ExchangeResponse) -> bool:
        """Take a whole answer; returns whether it is new."""
        self._boot_id = response.boot_id
        match response.WhichOneof("message"):
            case "joined":
                news, self.generation = not self.generation, response.generation
                return news
            case "result":
                return self._answers(response.result)
            case _:
                self.asked = []
                return True

    def joining(self) -> pb.ExchangeRequest:
        """The first request on a connection."""
        join = pb.Join()
        join.CopyFrom(self._join)
        if self.generation:
            join.resume.boot_id = self._boot_id
            join.resume.generation = self.generation
            join.resume.sequence = self.answered
            join.resume.layer_sequence = self._layer_answered
            join.resume.versions.update(self.versions)
        return pb.ExchangeRequest(join=join)

    def repetition(self) -> list[pb.ExchangeRequest]:
        """The requests to repeat after it."""
        return [*self._contributed, *self.asked]

    def _answers(self, result: pb.Result) -> bool:
        if result.sequence <= self.answered or not self.asked or not self.asked[0].HasField("contribution"):
            return False  # a duplicate, or for an exchange that was interrupted
        contribution = self.asked[0].contribution
        self.answered = result.sequence
        if contribution.HasField("layer"):
            self._layer_answered = result.sequence
            self.versions[contribution.layer] = result.version
        self._contributed, self.asked = self.asked, []
        return True
