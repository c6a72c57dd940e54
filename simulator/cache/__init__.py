"""Experts that do not all fit: hits and stalls of caching policies over a trace.

`compare` is the entry; `expert_cache` replays, `policies` evict, `predictors` fetch ahead.
"""
