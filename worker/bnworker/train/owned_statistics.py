"""The moving statistics as their owner has them: replacing them at the start of a run, and counting their updates."""

from __future__ import annotations

from bnworker.train.model import Perceptron
from bnworker.world import World


class UpdateCount:
    """How many training steps each layer's moving statistics contain.

    The version of a layer's state also counts replacements, and exchanges of steps that were lost with a rank and made
    again:

        updates = version now − (version at the start − updates at the start)

    Args:
        model: its layers hold the owner's statistics.
        updates: how many training steps these contain now.
    """

    def __init__(self, model: Perceptron, updates: int) -> None:
        self._model = model
        self._others = {norm.name: norm.state.version - updates for norm in model.norms}

    def by_layer(self) -> dict[str, int]:
        """The updates of each layer, by its name; rank 0's are right."""
        return {norm.name: norm.state.version - self._others[norm.name] for norm in self._model.norms}


def replace_owned(model: Perceptron, world: World) -> None:
    """Replace the owner's statistics by rank 0's, where the owner has these layers from an earlier run.

    An owner without them takes rank 0's when they enroll, and its version continues from theirs.

    Args:
        model: of this rank.
        world: the ranks.
    """
    if world.rank != 0:
        return
    for norm in model.norms:
        if world.pull(norm.name) is not None:
            world.push(norm)
