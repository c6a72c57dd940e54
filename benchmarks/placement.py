"""What the planner must show: `python benchmarks/placement.py [--json] [--only KEY ...]`.

One JSON object on stdout, each requirement under its key with `holds`; dotted keys nest. `--only
synthetic` runs every key below it. Real traces are read from ../shared/data beside the checkout; a
section that needs them says so when they are absent. Progress on stderr. Compilation happens before
any clock starts and is printed apart (`compile_s`). Sections live in placement_*.py and dispatch.py
beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import dispatch
import placement_methods
import placement_quality
import placement_scale

MOST_SPLIT_MS, MOST_LOCAL_MS, NEAR_LP = 0.5, 1.0, 1.01


def dispatch_section() -> dict[str, Any]:
    """Counts and quotas of one step, timed on one core; see dispatch.py."""
    found = dispatch.dispatch()
    one, four = found["one_node"], found["four_nodes"]
    holds = (
        one["counts_and_balanced_ms"] <= MOST_SPLIT_MS
        and four["counts_and_balanced_ms"] <= MOST_LOCAL_MS
        and max(one["balanced_lp_ratio_worst"], four["balanced_lp_ratio_worst"]) <= NEAR_LP
    )
    return {"holds": holds} | found


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    **placement_scale.SECTIONS,
    **placement_methods.SECTIONS,
    **placement_quality.SECTIONS,
    "dispatch": dispatch_section,
}


def main() -> None:
    """Run the chosen sections, print what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", nargs="*", default=[], help=f"of: {', '.join(SECTIONS)}")
    options = parser.parse_args()
    asked = [name for part in options.only for name in part.split(",") if name]
    chosen = [n for n in SECTIONS if not asked or any(_under(n, a) for a in asked)]
    unknown = [a for a in asked if not any(_under(n, a) for n in SECTIONS)]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are: {', '.join(SECTIONS)}")
    report: dict[str, Any] = {}
    for name in chosen:
        start = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = SECTIONS[name]()
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.1f} s: {json.dumps(found)}", file=sys.stderr, flush=True)
        _nest(report, name, found)
        if not options.json:
            _show(name, found)
    if options.json:
        print(json.dumps(report))


def _under(name: str, asked: str) -> bool:
    return name == asked or name.startswith(asked + ".")


def _nest(report: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    *groups, last = name.split(".")
    for group in groups:
        report = report.setdefault(group, {})
    report[last] = found


def _show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: {'holds' if found['holds'] else 'DOES NOT HOLD'}")
    for key, value in found.items():
        if key != "holds":
            print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
