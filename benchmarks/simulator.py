"""What the simulator must show: `python benchmarks/simulator.py [--json] [--only KEY ...]`.

One JSON object on stdout, one key per requirement, each with `holds`. Real tables, arrivals and
traces are read from ../shared/data beside the checkout; a section that needs them says so when they
are absent. Progress on stderr. Sections live in simulator_*.py beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import simulator_fits
import simulator_live
import simulator_oracle
import simulator_queues
import simulator_serving
import simulator_speed

SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "queueing": simulator_queues.queueing,
    "deepep": simulator_fits.deepep,
    "moe_gemm_h100": simulator_fits.moe_gemm_h100,
    "speed": simulator_speed.speed,
    "serving": simulator_serving.serving,
    "live": simulator_live.live,
    "oracle": simulator_oracle.oracle,
    "orderings": simulator_oracle.orderings,
}


def main() -> None:
    """Run the chosen sections, print what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", nargs="*", default=[], help=f"of: {', '.join(SECTIONS)}")
    options = parser.parse_args()
    chosen = [name for part in options.only for name in part.split(",") if name] or list(SECTIONS)
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are: {', '.join(SECTIONS)}")
    report: dict[str, Any] = {}
    for name in chosen:
        start = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        report[name] = SECTIONS[name]()
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.1f} s: {json.dumps(report[name])}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(report))
        return
    for name, found in report.items():
        print(f"\n{name}: {'holds' if found['holds'] else 'DOES NOT HOLD'}")
        for key, value in found.items():
            print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
