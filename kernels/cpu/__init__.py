"""The expert layer on CPUs: compiled loops over panels, and prepacked oneDNN weights.

Read `panels` and `packed` (the two backends) first, then `panel_loops`, `tiles` and `scalars`
(what the compiler makes vectors of). Knows nothing of plans, ranks or networks.
"""
