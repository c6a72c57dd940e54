"""How a step's tokens are split over the replicas of their experts.

`policies` names the rules. `assignment` sends every token to a slot, and is the one way there for
replays and for live ranks; `quotas` answers from counts alone, one layer of one step at a time. One
file per family of rules: `even_nearest`, `balanced` (on `min_max_flow`), `fewest_active`,
`serving_engines`, `deduplicated` (a token travels once per rank or node). `token_limit` drops or
reroutes what an expert cannot take; `replica_table` finds an expert's slots. Knows nothing of time,
search or Ray.
"""
