"""As attacked: damaged inputs, odd options, and what befalls a terminal and a cluster.

`field_attacked_fuzz.py` makes two hundred cases over all verbs; `field_attacked_cases.py` the ones
that were found by trying, each with the line that a person reads.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from field_attacked_cases import all_cases
from field_attacked_fuzz import CASES, SEED, cases, run_all, shown


def attacked() -> dict[str, Any]:
    """No traceback, no hang, the designed exit codes; each case with its line."""
    outcomes = run_all(cases(), _say)
    faulty = [outcome for outcome in outcomes if outcome.faults]
    of_kind = Counter(fault for outcome in faulty for fault in outcome.faults)
    made = all_cases(_say)
    return {
        "holds": not faulty and all(one["holds"] for one in made.values()),
        "fuzzed": CASES, "seed": SEED, "tracebacks": of_kind["traceback"],
        "hangs": of_kind["hang"],
        "exit_codes": dict(sorted(Counter(str(o.code) for o in outcomes).items())),
        "ascii_only": sum(o.case.ascii_only for o in outcomes),
        "on_a_terminal": sum(o.case.terminal for o in outcomes),
        "in_processes_of_their_own": sum(o.case.alone for o in outcomes),
        "slowest_seconds": round(max(o.seconds for o in outcomes), 1),
        "faults": dict(of_kind), "faulty": [shown(outcome) for outcome in faulty],
        "cases": made,
    }


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
