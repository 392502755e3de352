"""`python -m bnworker.cli` is `bnlayer`; the launcher starts ranks with it."""

from bnworker.cli import main

main()
