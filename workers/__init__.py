"""What runs: live ranks on Ray, plan switches, the control loop, jobs, the demo."""

import os
import sys

# Ray reads this once, when it is imported: clusters of ours ask for a token, and joining one of
# them from another process sends it. Set after that import it would contradict what Ray has read.
if "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
