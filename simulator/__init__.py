"""What would happen: requests, queues, steps, plan switches and failures under a plan, on a clock.

Read `serving/simulate` first. `pricing/` routes and prices steps, `events/` are faults, switches
and replanning, `whatif/` sweeps scenarios, `cache/` replays experts that do not fit, `calibrate/`
fits measured machines, `report/` shows results. Knows placement; nothing of live workers or
kernels.
"""
