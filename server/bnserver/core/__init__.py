"""The decisions of the service, pure: events in, effects out, time passed in.

`service` holds the jobs, `job` the generations of one, `generation` its ranks and their pending operation, `layers`
the owner's state, `validation` the checks of what comes in.
"""
