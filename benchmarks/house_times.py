"""How long the tests take, and how many lines an installation prints: both run what they measure.

`test_minutes` runs `make test` and `make test-fast` in the checkout. `install_lines` counts what
`make demo` printed on a pipe before its first result: of a log, or of a run of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from house_before import CHECKOUT, NotRunError

Section = dict[str, Any]

MOST_MINUTES = {"test": 12.0, "test-fast": 3.0}
MOST_INSTALL_LINES = 25
# The demo's first result is its verdict, which compares the new plan with `contiguous`.
RESULT = re.compile(r"contiguous.*(->|%)|(->|%).*contiguous")


def test_minutes() -> Section:
    """Wall minutes of both targets, and whether they passed."""
    found: Section = {}
    for target, most in MOST_MINUTES.items():
        start = time.perf_counter()
        ran = subprocess.run(["make", "-C", CHECKOUT, target], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, check=False)
        minutes = (time.perf_counter() - start) / 60
        lines = [line for line in ran.stdout.splitlines() if " passed" in line or " failed" in line]
        found[target] = {
            "minutes": round(minutes, 2), "at_most": most, "passed": ran.returncode == 0,
            "said": lines,
        }
        print(f"  make {target}: {minutes:.1f} minutes", file=sys.stderr, flush=True)
    holds = all(f["passed"] and f["minutes"] <= f["at_most"] for f in found.values())
    return {"holds": holds} | found


def install_lines(log: Path | None = None) -> Section:
    """Lines before the first result, of a log of `make demo` on a pipe or of a run of its own."""
    if log is None:
        ran = subprocess.run(["make", "-C", CHECKOUT, "demo"], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, check=False)
        if ran.returncode:
            raise NotRunError(f"make demo ended with {ran.returncode}: {ran.stdout[-300:]}")
        text = ran.stdout
    else:
        text = log.read_text()
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if RESULT.search(line)), None)
    if first is None:
        raise NotRunError("no line of the log looks like the demo's verdict")
    return {"holds": first <= MOST_INSTALL_LINES, "lines": first, "at_most": MOST_INSTALL_LINES,
            "all_lines": len(lines), "first_result": lines[first]}
