"""What should be: where every expert and replica lives, and how a step's tokens choose among
replicas.

The nouns stand here: `plan`, `cluster`, `hardware`, `memory`, `planning_traffic`. What is done with
them, in the order of their floors: `dispatch/` splits a step's tokens over replicas, `cost/` prices
a step and judges a plan, `comparison/` says whether a difference is real, `methods/` holds the
named placements, `search/` our own, `planning/` a whole planning run, `rebalancing/` the next plan
after the current one, `inspection/` describes plans, `formats/` are the engines' own files. Knows
nothing of queues, clocks, live workers or tensors.
"""
