"""Which tests this environment's MPI can run."""

import sys
from pathlib import Path

# Only Open MPI has `--with-ft ulfm`; its wheel brings prterun. Without it an elastic job over MPI is an error, which
# tests/unit/worker/test_elastic_job.py shows.
collect_ignore = [] if Path(sys.prefix, "bin", "prterun").exists() else ["test_elastic.py"]
