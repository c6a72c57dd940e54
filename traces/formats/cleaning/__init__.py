"""What was found, made sound: what cannot be is refused with its place, what is dead left out.

Read `found_routes` (routing as a file holds it), `route_survey` (every choice looked at),
`repeated_routes` (warm-up), `routes` (the trace), and `loads` (counts as a profile). `spool` keeps
long streams on disk. Knows arrays. Knows nothing of files.
"""
