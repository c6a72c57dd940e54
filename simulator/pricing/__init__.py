"""What a simulated step takes: `step_router` routes its tokens, `attribution` says who waited for
whom.

`memory` is the capacity for KV, `measured_range` tells where a price is extrapolated. Knows no
clock.
"""
