"""The fault rig: what breaks a job on purpose, and what then decides whether a promise was kept.

`worker` is one rank, `ranks` and `daemons` hold the processes, `proxy` stands between them and follows a plan from
`faults`. Ranks write a `history`, which `model` judges. `kills`, `wire`, `slow` and `disk` are the campaigns: a few
rounds of each in the tests, many in `soak`.
"""
