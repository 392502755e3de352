"""What every transport must do, as bodies that one rank runs: alone, as a thread, or as a process under mpiexec.

A body gets this rank's world and asserts on what this rank sees. What it returns must be equal on every rank: the
runner compares it, so that "the same bits" and "the same text" are checked across ranks too.
"""

from support.contract import disagreements, layers, plain, pullbacks, reductions, refusals, running, setting
from support.contract.registry import BODIES, names

__all__ = [
    "BODIES",
    "disagreements",
    "layers",
    "names",
    "plain",
    "pullbacks",
    "reductions",
    "refusals",
    "running",
    "setting",
]
