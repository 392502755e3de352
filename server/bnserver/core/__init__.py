"""The decisions of the service, pure: events in, effects out, time passed in.

`service` holds the jobs, `job` the generations of one, `generation` who has joined and spoken, `layers` what the
owner owns, `validation` what is let in.
"""
