"""What a trace holds (`summary`), whether it is long enough (`learning_curve`), whether it changed
(`drift`).

Knows traces and steps. Knows nothing of placement.
"""
