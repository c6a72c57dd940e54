"""Improving one layer's slots by small changes: one loop, interchangeable objectives.

Read `annealer` first, the loop; then any objective: `exact_balance` (up to ten devices),
`water_filled` (more), `fixed_shares` (dispatch blind to load), `step_time`, `even_average` (loads
alone). `token_split` keeps the splits of `water_filled` and `step_time`. Knows arrays and compiled
loops only; nothing of tasks, traces or plans.
"""
