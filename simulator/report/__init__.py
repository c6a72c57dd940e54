"""Answers as pages and pictures: one self-contained HTML file, or PNG files.

Read `report.py` first (what a report is), then a question's own report (`plan_report.py`,
`simulate_report.py`, ...), `compared_parts.py` and `blame_parts.py` (what several share), `page.py`
and `pictures.py` (HTML, PNG). `charts/` has a file a picture, `views.py` and `traffic_matrix.py`
count what maps show, `chrome_trace.py` writes a timeline for Perfetto. Knows finished results.
Computes nothing that decides.
"""
