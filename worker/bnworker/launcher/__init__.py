"""Starts the ranks of a job on this machine, or on several, and ends them: all of them, whatever happens.

Decisions: `supervision` (what to do when a rank ends), `prefix` (lines with the rank in front), `mpi` (which
mpiexec, and what it needs). Effects: `reach` (whether the service is there), `starting` (environments and
processes), `reactor` (waiting for output, ends and signals), `output` (screen and log files), `running` (the job
from start to end), `nodes` and `links` (what the launchers of several hosts tell each other).
`guardian` and `mpirank` are small programs of their own.
"""

from bnworker.launcher.output import Output
from bnworker.launcher.running import launch
from bnworker.launcher.starting import Job, LaunchError, Several

__all__ = ["Job", "LaunchError", "Output", "Several", "launch"]
