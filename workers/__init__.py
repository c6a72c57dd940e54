"""What runs: live ranks on Ray, plan switches, the control loop, jobs, the demo."""

import os

# Ray reads this once, when it is imported: clusters of ours ask for a token, and joining one of
# them from another process sends it.
os.environ.setdefault("RAY_AUTH_MODE", "token")
