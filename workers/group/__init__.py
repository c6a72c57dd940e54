"""The face of a running group: start it, find it, ask it.

`group` is what people call, `connection` reaches the coordinator, `run_folder` keeps what a run
leaves. Knows nothing of how a step is computed.
"""
