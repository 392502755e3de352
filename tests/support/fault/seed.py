"""The seed of the fault tests: printed in the header of every run, and chosen by FAULT_SEED."""

import os

SEED = int(os.environ.get("FAULT_SEED") or 1)
