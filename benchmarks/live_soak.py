"""Twenty minutes under load with a switch every half minute: everything stays flat."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from live_load import Load, random_plan, text_prompts

from loadmaster.workers.fleet.ray_fleet import NAMESPACE
from loadmaster.workers.group import run_folder
from loadmaster.workers.group.group import Group

GROWTH_BAR = 0.02
FILES_BAR = 8


@dataclass(frozen=True)
class _Sample:
    memory_mib: float
    open_files: int
    journal_files: int


def soak(group: Group, *, minutes: float = 20.0, every_s: float = 30.0) -> dict[str, Any]:
    """Load and a switch every half minute: memory, files, sockets and actors stay flat.

    After a first quarter of warm-up, the last quarter is compared with the second.
    """
    prompts, _ = text_prompts(48, 384)
    want = group.generate(prompts, 8)
    actors = _actors(group.name)
    pids = [*group.status()["pids"], _coordinator_pid(group)]
    samples: list[_Sample] = []
    ends = time.monotonic() + 60 * minutes
    switches = 0
    with Load(group, prompts, 8, want) as load:
        while time.monotonic() < ends:
            due = time.monotonic() + every_s
            plan = random_plan(group.model_spec, group.plan.num_devices, 900 + switches % 8)
            group.apply(plan)
            switches += 1
            samples.append(
                _Sample(_memory_mib(pids), _open_files(pids), _journal_files(group.name))
            )
            time.sleep(max(0.0, due - time.monotonic()))
    recoveries, leaked = len(group.status()["recoveries"]), sorted(_actors(group.name) ^ actors)
    flat = _flat(samples)
    return {
        **load.tally.to_dict(), "minutes": minutes, "switches": switches, **flat,
        "leaked_actors": leaked, "false_alarms": recoveries,
        "holds": flat["holds"] and not leaked and not recoveries and load.tally.clean,
    }


def _flat(samples: Sequence[_Sample]) -> dict[str, Any]:
    """How much grew from the second to the last quarter of the samples."""
    quarter = len(samples) // 4
    if quarter < 2:
        return {"holds": False, "reason": f"{len(samples)} samples are too few: soak for longer"}
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    start, end = (float(np.median([s.memory_mib for s in part])) for part in (early, late))
    files = max(s.open_files for s in late) - max(s.open_files for s in early)
    journal = max(s.journal_files for s in late) - max(s.journal_files for s in early)
    growth = end / start - 1.0
    return {
        "memory_mib": [round(s.memory_mib) for s in samples[:: max(1, len(samples) // 10)]],
        "memory_growth": growth,
        "open_files_growth": files,
        "journal_files": samples[-1].journal_files,
        "journal_files_growth": journal,
        "holds": growth <= GROWTH_BAR and files <= FILES_BAR and journal <= FILES_BAR,
    }


def _journal_files(name: str) -> int:
    """Files that the group keeps on disk: its journal and the plans beside it."""
    return sum(path.is_file() for path in run_folder.group_folder(name).rglob("*"))


def _actors(name: str) -> set[str]:
    listed = ray.util.list_named_actors(all_namespaces=True)
    mine = {a["name"] for a in listed if a["namespace"] == NAMESPACE}
    return {n for n in mine if n == name or n.startswith(f"{name}/")}


def _coordinator_pid(group: Group) -> int:
    pid: int = ray.get(group._line._actor.__ray_call__.remote(lambda self: os.getpid()))
    return pid


def _memory_mib(pids: Sequence[int]) -> float:
    """Private memory of the processes: what they would give back by ending."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):      # a rank that was replaced: a false alarm, counted
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Private_Clean", "Private_Dirty")):
                    total += int(line.split()[1])
    return total / 1024


def _open_files(pids: Sequence[int]) -> int:
    """Open descriptors, sockets among them."""
    count = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            count += len(os.listdir(f"/proc/{pid}/fd"))
    return count
