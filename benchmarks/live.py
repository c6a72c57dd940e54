"""Live workers under switches, faults and time, on the reference model with 4 ranks.

    python benchmarks/live.py --json               all, one JSON object
    python benchmarks/live.py --only recovery      one section (may be given again)
    python benchmarks/live.py --small              few repeats: shows that it runs, proves little

Give it a quiet machine: several figures are wall times. All takes over an hour; every section's
figures go to stderr as soon as it is done. `soak` alone takes `--minutes`. A section that fails is
recorded as {"holds": false, "error": ...}, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import torch
from live_control import controller, two_ranks_wall
from live_faults import corruption, hang, recovery
from live_soak import soak
from live_switches import (
    failed_requests,
    identical,
    large_switch_slowdown,
    moved_bytes,
    switch_slowdown,
)

from loadmaster.workers.group.group import Group
from loadmaster.workers.reference import reference_model_dir

RANKS = 4

Section = Callable[[], dict[str, Any]]


def on_group(section: Callable[..., dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Run a section on a fresh group of the reference model."""
    name = f"live-{section.__name__.replace('_', '-')}"
    with Group.start(reference_model_dir(), ranks=RANKS, name=name) as group:
        return section(group, **options)


def slowdown(small: bool) -> dict[str, Any]:
    """Both models."""
    few = {"switches": 2} if small else {}
    reference = on_group(switch_slowdown, **few)
    large = large_switch_slowdown(ranks=RANKS, **few)
    return {"reference": reference, "large": large,
            "holds": reference["holds"] and large["holds"]}


def sections(minutes: float, small: bool) -> dict[str, Section]:
    """Key -> what measures it."""

    def few(**options: Any) -> dict[str, Any]:
        return options if small else {}

    return {
        "identical": lambda: on_group(identical, **few(requests=48)),
        "failed_requests": lambda: on_group(failed_requests, **few(switches=3)),
        "switch_slowdown": lambda: slowdown(small),
        "moved_bytes": lambda: on_group(moved_bytes),
        "recovery": lambda: on_group(recovery, **few(kills=3)),
        "hang": lambda: on_group(hang, **few(times=1)),
        "corruption": lambda: corruption(**few(flips=50)),
        "controller": lambda: controller(**few(windows_each=2)),
        "two_ranks_wall": lambda: two_ranks_wall(**few(rounds=2)),
        "soak": lambda: on_group(soak, minutes=minutes),
    }


def measured(section: Section) -> dict[str, Any]:
    """What the section found; what it raised, so that the other sections still run."""
    try:
        found = section()
        json.dumps(found)
    except Exception as error:
        traceback.print_exc()
        return {"holds": False, "error": f"{type(error).__name__}: {error}"}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections asked for; exit code 1 if one fails or does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", action="append", help="sections to run")
    parser.add_argument("--minutes", type=float, default=20.0, help="length of the soak")
    parser.add_argument("--small", action="store_true", help="few repeats")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # Ray prints what befalls its workers on stdout: that goes to stderr, the figures alone to ours.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    known = sections(options.minutes, options.small)
    unknown = set(options.only or ()) - set(known)
    if unknown:
        parser.error(f"no section {sorted(unknown)}; there are: {', '.join(known)}")
    found = {}
    for name, section in known.items():
        if options.only is None or name in options.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            found[name] = measured(section)
            print(f"{name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
            if not options.json:
                print(f"{name}: {json.dumps(found[name])}", file=out, flush=True)
    if options.json:
        print(json.dumps(found, indent=1), file=out, flush=True)
    sys.exit(0 if all(f.get("holds") is True for f in found.values()) else 1)


if __name__ == "__main__":
    main()
