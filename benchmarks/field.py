"""What people really have: `python benchmarks/field.py [--json] [--only KEY ...]`.

One JSON object on stdout, each requirement under its key with `holds`; progress on stderr. A
section is the function of its own name in `field_KEY.py` beside this file. Inputs as found in the
field lie beside the checkout (`../shared/data`); where they are absent, a section that needs them
says so and does not hold.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from typing import Any

KEYS = (
    "engine_rules", "configs", "dumps", "plans", "arrivals", "limits", "coverage", "honest",
    "attacked", "never_worse",
)


def main() -> None:
    """Run the chosen sections, print what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", nargs="*", default=[], help="sections to run")
    asked = [key for part in parser.parse_args().only for key in part.split(",") if key]
    unknown = [key for key in asked if key not in KEYS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are: {', '.join(KEYS)}")
    report: dict[str, dict[str, Any]] = {}
    for key in asked or KEYS:
        print(f"{key} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        report[key] = getattr(importlib.import_module(f"field_{key}"), key)()
        report[key]["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(report, indent=2))
    if not all(section["holds"] for section in report.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
