"""Traces on disk: a manifest, and shards of routing that it vouches for.

Read `store` first, then `manifest` and `shard_file`. Knows nothing of models that run.
"""
