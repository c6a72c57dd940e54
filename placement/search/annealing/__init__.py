"""Improving one layer's slots by small changes, under interchangeable objectives.

`annealer` holds the loop; every other file is one objective. Knows arrays and compiled loops only.
"""
