"""What a training run leaves to look at: a page with pictures (`--report`) and TensorBoard files (`--tensorboard`).

    events → history → figures → page
                    └→ event files

Laws of this package:
1. It only listens: a run with a report takes the same steps, and makes the same exchanges, as one without.
2. What it needs is looked for before the run starts (`extras`), so that no training is lost to a missing package.
3. Memory and files are bounded: of a run of any length about a thousand points of steps are kept.
4. The page is one file: it fetches nothing, and says so to the browser.
"""

from bnworker.train.report.extras import MissingExtraError, check

__all__ = ["MissingExtraError", "check"]
