"""From a plan that runs to a better one: what moves, what that costs, whether it pays back.

`rebalance` is the entry; `budget_sweep` and `move_budget` limit moves, `switch_payback` and
`policy` decide, `advise` answers in one go, `survivors` replans after a loss. Knows nothing of how
moves are carried out.
"""
