"""What the house must show: `python benchmarks/house.py [--json] [--only KEY ...]`.

One JSON object on stdout, each requirement under its key with `holds`. What runs alone takes
minutes; `mutants` (an hour of one core), `test_minutes` (runs the tests) and `install_lines` (runs
the demo, or reads `--demo-log FILE`) only when named. The commit before is taken from this
checkout's own history; where it lacks that commit, sections that need it say so and do not hold.
Sections live in house_*.py beside this file. Progress on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import house_shape
import house_times
from house_before import NotRunError, before

Section = dict[str, Any]

ONLY_WHEN_NAMED = ("mutants", "test_minutes", "install_lines")


def plans_unchanged() -> Section:
    """Fixed inputs before and after."""
    return dict(importlib.import_module("house_plans").plans_unchanged())


def bits() -> Section:
    """A row's bits, whatever batch it is in, on every backend and instruction set."""
    return dict(importlib.import_module("house_bits").bits(before()))


def dispatch_agrees() -> Section:
    """Live ranks choose the slots that the planner judged."""
    return dict(importlib.import_module("house_dispatch").dispatch_agrees())


def mutants() -> Section:
    """Small mistakes that the tests notice, before and after; in a process without the package."""
    ran = subprocess.run([sys.executable, Path(__file__).with_name("house_mutants.py")],
                         stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        raise NotRunError(f"house_mutants.py ended with {ran.returncode}")
    return dict(json.loads(ran.stdout))


def sections(demo_log: Path | None) -> dict[str, Callable[[], Section]]:
    """Every section by its key."""
    return {
        "plans_unchanged": plans_unchanged, "bits": bits, "dispatch_agrees": dispatch_agrees,
        **house_shape.SECTIONS, "mutants": mutants, "test_minutes": house_times.test_minutes,
        "install_lines": lambda: house_times.install_lines(demo_log),
    }


def main() -> None:
    """Run the chosen sections, print what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", nargs="*", default=[], help="sections to run")
    parser.add_argument("--demo-log", type=Path, help="what `make demo` printed on a pipe")
    options = parser.parse_args()
    known = sections(options.demo_log)
    asked = [name for part in options.only for name in part.split(",") if name]
    unknown = [name for name in asked if name not in known]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are: {', '.join(known)}")
    named = asked or [n for n in known if n not in ONLY_WHEN_NAMED]
    if options.demo_log is not None and "install_lines" not in named:
        named.append("install_lines")
    report: dict[str, Section] = {}
    for name in named:
        start = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            report[name] = known[name]()
        except (NotRunError, ImportError) as error:
            report[name] = {"holds": False, "not_run": str(error)}
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        if not options.json:
            _show(name, report[name])
    if options.json:
        print(json.dumps(report))


def _show(name: str, found: Section) -> None:
    print(f"\n{name}: {'holds' if found['holds'] else 'DOES NOT HOLD'}")
    for key, value in found.items():
        if key != "holds":
            print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
