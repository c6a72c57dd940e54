"""From a plan that runs to a better one: what moves, what that costs, whether it pays back.

`rebalance` is the entry; `budget_sweep` and `move_budget` limit moves, `switch_payback` prices
them. `advise` answers a person in one go, `one_more_slot` where no plan does any good.
`proposal` is what a control loop thinks, live or simulated; it asks `policy` when to look and
whether to switch. `survivors` replans after a loss. Knows nothing of how moves are carried out.
"""
