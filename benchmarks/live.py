"""Live workers under switches, faults and time, on the reference model with 4 ranks.

    python benchmarks/live.py --json               all, one JSON object
    python benchmarks/live.py --only recovery      one section (may be given again)

Give it a quiet machine: several figures are wall times. `soak` alone takes `--minutes`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import torch
from live_control import controller, two_ranks_wall
from live_faults import corruption, hang, recovery, soak
from live_switches import (
    failed_requests,
    identical,
    large_switch_slowdown,
    moved_bytes,
    switch_slowdown,
)

from loadmaster.workers.group import Group
from loadmaster.workers.reference import reference_model_dir

RANKS = 4


def on_group(section: Callable[..., dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Run a section on a fresh group of the reference model."""
    name = f"live-{section.__name__.replace('_', '-')}"
    with Group.start(reference_model_dir(), ranks=RANKS, name=name) as group:
        return section(group, **options)


def slowdown() -> dict[str, Any]:
    """Both models."""
    small, large = on_group(switch_slowdown), large_switch_slowdown(ranks=RANKS)
    return {"reference": small, "large": large, "holds": small["holds"] and large["holds"]}


def sections(minutes: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """Key -> what measures it."""
    return {
        "identical": lambda: on_group(identical),
        "failed_requests": lambda: on_group(failed_requests),
        "switch_slowdown": slowdown,
        "moved_bytes": lambda: on_group(moved_bytes),
        "recovery": lambda: on_group(recovery),
        "hang": lambda: on_group(hang),
        "corruption": corruption,
        "controller": controller,
        "two_ranks_wall": two_ranks_wall,
        "soak": lambda: on_group(soak, minutes=minutes),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--only", action="append", help="sections to run")
    parser.add_argument("--minutes", type=float, default=20.0, help="length of the soak")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # Ray prints what befalls its workers on stdout: that goes to stderr, the figures alone to ours.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    known = sections(options.minutes)
    unknown = set(options.only or ()) - set(known)
    if unknown:
        parser.error(f"no section {sorted(unknown)}; there are: {', '.join(known)}")
    found = {}
    for name, measure in known.items():
        if options.only is None or name in options.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            found[name] = measure()
            if not options.json:
                print(f"{name}: {json.dumps(found[name])}", file=out, flush=True)
    if options.json:
        print(json.dumps(found, indent=1), file=out, flush=True)


if __name__ == "__main__":
    main()
