"""Looking for better plans while a group serves.

`controller` decides window by window; `traffic_window` and `measured_times` are what it sees,
`decisions` what it leaves, `switch_preview` a dry run, `supervise` the loop around it.
"""
