"""What a step costs under a plan, and the least that any plan could cost.

`step_loads` and `count_traffic` count tokens and transfers, `step_cost` prices them (`overlap`,
`max_min_rates`, `token_transfers`; `unplanned` what a plan does not hold), `evaluate` judges a plan
over many steps, `lower_bounds` holds for all plans. Knows nothing of how plans are made.
"""
