"""Our own placement of one layer: start from a packing, anneal on scenarios, score on held-out
steps, keep the best.

Read `layer_search` first; `layer_task` is what it is given and answers. `scenarios` draws what is
annealed on, `annealing/` improves slots under one objective each, `balance_score` and `time_search`
score. Knows one layer at a time; nothing of other layers, files or processes.
"""
