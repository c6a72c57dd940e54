"""What runs: live ranks on Ray, plan switches, the control loop, jobs, the demo.

`group/` is the face; `coordinator/` leads, `rank/` computes, `fleet/` says where ranks live and
`protocol/` what they say to each other; `control/` looks for better plans while they serve;
`calibrate/`, `jobs/`, `demo/` and `reference/` (the shipped model) complete it. Knows nothing of
who asks: no command line, no HTTP.
"""

import os
import sys

# Ray reads this once, when it is imported: clusters of ours ask for a token, and joining one of
# them from another process sends it. Set after that import it would contradict what Ray has read.
if "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
