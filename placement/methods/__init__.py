"""The placements that have names: baselines, the engines' balancers and the papers' methods.

`baselines` lists the simple ones; `eplb`, `affinity`, `moetuner` are others' algorithms;
`replicate` and `pack` are their parts, `milp` the solver. Knows loads and transitions; nothing of
our search.
"""
