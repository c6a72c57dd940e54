"""Looking for better plans while a group serves.

`controller` acts window by window on what `placement/rebalancing/proposal.py` decides;
`traffic_window` and `measured_times` are what it sees, `decisions` what it is given,
`switch_preview` a dry run, `supervise` the loop around it.
"""
