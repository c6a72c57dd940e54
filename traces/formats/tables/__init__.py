"""What people write down: tables of routes or counts, histories, a file per rank.

Read `row_columns` (which column is what) first, then `row_routes`, `row_loads` with `ranks`, and
`load_documents` (JSON). Knows rows and names. Knows nothing of engines' own files but their counts.
"""
