"""What is asked of the machine, by all floors: whole files, locks, documents, compiled loops,
threads.

Read `documents` first (what a person wrote), then `atomic_file` and `lock` (what must not be half
written), `compiled` and `parallel` (how loops run). Knows nothing of experts, plans or traces.
"""
