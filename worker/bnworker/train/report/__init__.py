"""The report of a training run: a page with figures (`--report`), and TensorBoard files (`--tensorboard`).

    events → history → figures → page
                    └→ event files

Laws:
1. A report does not influence the run: it makes the same steps and exchanges with and without one.
2. The packages that it needs are checked before the run (`extras`), so that no training is lost to a missing one.
3. Memory and files are bounded: about a thousand points are kept of a run of any length.
4. The page is one file that loads nothing; its content security policy forbids it.
"""

from bnworker.train.report.extras import MissingExtraError, check

__all__ = ["MissingExtraError", "check"]
