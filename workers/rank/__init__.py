"""One rank: its share of a model, its experts, the exchange with the others.

Read `rank` first, then `expert_layer` (dispatch, exchange, compute, combine), `dispatch`,
`exchange`, `expert_store` and `staging`; `company_check` tries, once loaded, whether requests
change each other's bits. Knows nothing of requests, other ranks' memory or Ray.
"""
