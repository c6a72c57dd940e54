"""Who leads a group: requests become steps, plans become active, losses are recovered from.

Read `coordinator` first, then `scheduler`, `request_registry`, `step_boundary`, `active_plans`,
`journal` and `recovery`. Knows ranks by their answers only; nothing of tensors.
"""
