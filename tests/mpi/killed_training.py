"""`bnlayer train` as one rank of several; the first is killed after its tenth step: killed_training.py OPTIONS."""

import os
import signal
import sys

from bnlayer.environment import announced
from bnworker.cli import main
from bnworker.train.checkpoint import Checkpoint
from bnworker.train.elastic import Kept

keep = Kept.keep


def kept_until_killed(self: Kept, checkpoint: Checkpoint) -> None:
    """Keep the state after a step; the first time it is the tenth one's, rank 0 gets no further."""
    keep(self, checkpoint)
    if self.saves == 10 and announced(os.environ)[0].rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


Kept.keep = kept_until_killed  # type: ignore[method-assign]
sys.argv[1:1] = ["train"]
main()
