"""What a person asks, in names, files and sizes; answered in objects.

`inputs` reads traces, clusters, models and plans; `serving` builds workloads and what a simulated
server is. Used by every front (`cli/`, `service/`). Knows nothing of HTTP or terminals.
"""
