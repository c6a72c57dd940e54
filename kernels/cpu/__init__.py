"""The expert layer on CPUs: compiled loops over panels, and prepacked oneDNN weights.

Read `panels` and `packed` (the two backends) first, then `row_blocks` (how a library's products are
called, so that a row's bits are its own), `panel_loops`, `tiles` and `scalars` (what the compiler
makes vectors of). `dense` does the same for a model's other layers. Knows nothing of plans, ranks
or networks.
"""
