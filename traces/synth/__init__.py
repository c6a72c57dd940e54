"""Routing made from a seed: `generate` says what is drawn, `sampling` draws it.

Knows nothing of models or placement.
"""
