"""How far a generation is: the operations that are complete, and the last answers.

Laws:
1. A contribution counts once, however often it arrives: whether one is the next, a repetition, or neither, is decided
   here.
2. Only the latest answer is kept, for a rank that did not get it and asks again. No rank can be further behind,
   because the next operation completes only with all of them.
3. The latest answer on a layer is kept as well: operations on layers are journaled, plain ones are not, so after a
   restart of the service it shows whether the owner lacks what was answered to a rank.

It knows no ranks, and does not know what is being gathered (`gathering`) or owned (`layers`).
"""

from __future__ import annotations

from collections.abc import Mapping

from bnlayer.collective import Call
from bnlayer.state import LayerState
from bnserver.core.answers import Answer


class Progress:
    """Of one generation.

    Attributes:
        completed: operations so far.
        answer: of the last one.
        layer_answer: of the last one on a layer.
    """

    def __init__(self) -> None:
        self.completed = 0
        self.answer: Answer | None = None
        self.layer_answer: Answer | None = None

    @property
    def latest(self) -> Call | None:
        """The last operation that is complete, as far as it is known."""
        return self.answer.call if self.answer is not None else None

    def finished(self, answer: Answer) -> None:
        """An operation is complete."""
        self.completed, self.answer = answer.sequence, answer
        if answer.call.key.layer is not None:
            self.layer_answer = answer

    def repeated(self, sequence: int, call: Call, answered: int, waiting: Call | None) -> Answer | str | None:
        """What to do with a contribution whose number is not the next one's, or whose rank waits already.

        Args:
            sequence: its number.
            call: which it takes part in.
            answered: the last contribution whose answer its rank is known to have.
            waiting: the call in which its rank waits; None if it does not.

        Returns:
            The answer that the rank gets again; None if it gets nothing; or why it is refused.
        """
        answer = self.answer
        if sequence == self.completed + 1:
            if call == waiting:
                return None
            return f"expected nothing while contribution {sequence} waits for its answer, received another"
        if sequence <= min(answered, self.completed):
            return None
        if answer is not None and sequence == answer.sequence:
            if call == answer.call:
                return answer
            return f"expected contribution {sequence} as it was before, received another of this number"
        kept = ", whose answer is not kept any more" if sequence <= self.completed else ""
        return f"expected contribution {self.completed + 1}, received contribution {sequence}{kept}"

    def is_behind(self, layer_answered: int, versions: Mapping[str, int], states: Mapping[str, LayerState]) -> bool:
        """Whether the owner lacks something that was answered to a rank.

        Args:
            layer_answered: the rank's last contribution to a layer that was answered.
            versions: of the layers, as they were answered to the rank.
            states: the owner's.
        """
        completed = self.layer_completed
        if layer_answered != completed:
            # A rank that lacks an answer may know of a higher version, as ranks can set an earlier state. The owner
            # can't lack a push that this rank knows of: it came before the rank's contribution to that answer.
            return layer_answered > completed
        return any(name not in states or states[name].version < version for name, version in versions.items())

    @property
    def layer_completed(self) -> int:
        """The number of the last operation on a layer; 0 if there was none."""
        return self.layer_answer.sequence if self.layer_answer is not None else 0
