"""Reports for people: one self-contained HTML page with the pictures inside."""
