"""Traces from a running model: `recorder` receives each layer's choices, `token_buffer` holds them
until they are written, `record_model` runs a checkpoint over text. Knows nothing of placement.
"""
