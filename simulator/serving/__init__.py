"""Requests served under a plan: arrivals, batches, steps, latencies.

`simulate` is the entry; `workload` and `token_source` make requests, `batching` forms steps,
`event_loop` runs them on `active_state`, `result` holds what came out, `replay` plays recorded
steps, `compare_served` and `paired_difference` compare plans. Knows nothing of files or reports.
"""
