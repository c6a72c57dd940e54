"""The whole loop on this machine: serve, record, plan, simulate, apply, measure. `run` is the
entry."""
