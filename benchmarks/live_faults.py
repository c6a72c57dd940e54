"""Dying ranks, hanging ranks, flipped bits, and twenty minutes of all at once but the faults."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from live_load import Load, random_plan, text_prompts

from loadmaster.errors import LoadmasterError
from loadmaster.workers.group import Group
from loadmaster.workers.launch import NAMESPACE
from loadmaster.workers.model import MoeCheckpoint, fingerprint
from loadmaster.workers.reference import reference_model_dir
from loadmaster.workers.slots import ExpertStore
from loadmaster.workers.staging import Staging, to_bytes

RECOVERY_BAR_S = 30.0
GROWTH_BAR = 0.02


def recovery(group: Group, *, kills: int = 10, seed: int = 0) -> dict[str, Any]:
    """SIGKILL of a random rank at random moments; every third while experts move."""
    rng = np.random.default_rng(seed)
    prompts, _ = text_prompts(48, 384)
    want = group.generate(prompts, 8)
    events = []
    with Load(group, prompts, 8, want) as load:
        for number in range(kills):
            time.sleep(float(rng.uniform(1.0, 4.0)))
            kind = ("serving", "staging", "committing")[number % 3]
            events.append(_kill(group, kind, rng, number))
    tally = load.tally
    worst = max(e["seconds"] for e in events)
    return {
        **tally.to_dict(),
        "events": events,
        "worst_seconds": worst,
        "holds": tally.wrong == 0 and tally.failed == 0 and worst <= RECOVERY_BAR_S,
    }


def _kill(group: Group, kind: str, rng: np.random.Generator, number: int) -> dict[str, Any]:
    status = group.status()
    before, victim = len(status["recoveries"]), int(rng.integers(0, len(status["pids"])))
    outcome: list[str] = []
    thread = threading.Thread(target=_try_apply, args=(group, number, outcome))
    if kind != "serving":
        thread.start()
        _await(lambda: group.status()["switching"], 10.0)
        if kind == "committing":      # the last moments of a switch
            _await(lambda: not group.status()["switching"], float(rng.uniform(0.5, 1.5)))
    killed_at = time.time()
    os.kill(status["pids"][victim], signal.SIGKILL)
    _await(lambda: len(group.status()["recoveries"]) > before, 120.0)
    if kind != "serving":
        thread.join()
    last = group.status()["recoveries"][-1]
    return {
        "kind": kind,
        "rank": victim,
        "noticed_seconds": round(last.noticed_at - killed_at, 2),
        "seconds": round(last.noticed_at + last.seconds - killed_at, 2),
        "switch": outcome[0] if outcome else None,
    }


def _try_apply(group: Group, seed: int, outcome: list[str]) -> None:
    plan = random_plan(group.model_spec, group.plan.num_devices, 500 + seed)
    try:
        group.apply(plan)
        outcome.append("committed")
    except LoadmasterError as error:
        outcome.append(f"aborted: {error}")


def _await(condition: Any, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def hang(group: Group, *, times: int = 3) -> dict[str, Any]:
    """SIGSTOP of a rank: how long until the group acts, against its own promise."""
    prompts, _ = text_prompts(48, 384)
    want = group.generate(prompts, 8)
    events = []
    with Load(group, prompts, 8, want) as load:
        for number in range(times):
            time.sleep(6.0)
            steps = group.measurements(group.step - 200)
            limit_s = max(5e-6 * float(np.quantile(steps.step_wall_us, 0.99)), 1.0) + 1.0
            before = len(group.status()["recoveries"])
            stopped_at = time.time()
            os.kill(group.status()["pids"][number % group.plan.num_devices], signal.SIGSTOP)
            _await(lambda before=before: len(group.status()["recoveries"]) > before, 120.0)
            last = group.status()["recoveries"][-1]
            noticed_s = last.noticed_at - stopped_at
            events.append({
                "noticed_seconds": round(noticed_s, 2), "limit_seconds": round(limit_s, 2),
                "holds": noticed_s <= limit_s,
            })
    tally = load.tally
    return {**tally.to_dict(), "events": events,
            "holds": all(e["holds"] for e in events) and tally.wrong == tally.failed == 0}


def corruption(*, flips: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Single bits flipped in experts that were staged: on the way, and after they arrived."""
    rng = np.random.default_rng(seed)
    checkpoint = MoeCheckpoint(reference_model_dir())
    shape, dtype = checkpoint.shape, torch.bfloat16
    stores = [ExpertStore(lambda slots: shape.allocate(slots, dtype)) for _ in range(6)]
    staging = Staging(stores, lambda: shape.empty_expert(dtype))
    refused = 0
    for number in range(flips):
        key = (int(rng.integers(0, 6)), int(rng.integers(0, shape.experts)))
        tensors = checkpoint.read_expert(*key, dtype)
        expected = fingerprint(tensors)
        data = to_bytes(tensors)
        bit = int(rng.integers(0, 8 * len(data)))
        if number % 2:      # on the way
            data[bit // 8] ^= 1 << (bit % 8)
            refused += not _arrives(staging, key, data, expected)
        else:               # in memory, between arrival and commit
            if not _arrives(staging, key, data, expected):
                raise SystemExit(f"a whole expert {key} was refused")
            held = stores[key[0]].get(key[1])
            name = ("down", "gate_up")[bit % 2]
            flat = held[name].view(torch.int16).flatten()
            flat[bit % len(flat)] ^= 1 << (bit % 15)
            stores[key[0]].put(key[1], held)
            refused += staging.verify({key: expected}) == [key]
        staging.abort()
        stores[key[0]].drop(key[1])
    return {"flips": flips, "refused": refused, "holds": refused == flips}


def _arrives(staging: Staging, key: tuple[int, int], data: Any, expected: str) -> bool:
    staging._incoming[key] = data
    staging._arrived_bytes[key] = len(data)
    return staging._accept(key, expected)


# ---- soak ------------------------------------------------------------------------------------


def soak(group: Group, *, minutes: float = 20.0, every_s: float = 30.0) -> dict[str, Any]:
    """Load and a switch every half minute: memory, open files, sockets and actors stay flat."""
    prompts, _ = text_prompts(48, 384)
    want = group.generate(prompts, 8)
    actors = _actors(group.name)
    pids = [*group.status()["pids"], _coordinator_pid(group)]
    samples: list[tuple[float, float, int]] = []
    ends = time.monotonic() + 60 * minutes
    switches = 0
    with Load(group, prompts, 8, want) as load:
        while time.monotonic() < ends:
            due = time.monotonic() + every_s
            plan = random_plan(group.model_spec, group.plan.num_devices, 900 + switches % 8)
            group.apply(plan)
            switches += 1
            samples.append((time.monotonic(), _memory_mib(pids), _open_files(pids)))
            time.sleep(max(0.0, due - time.monotonic()))
    status = group.status()
    warm = max(2, len(samples) // 4)
    start, end = (np.median([m for _, m, _ in part]) for part in (
        samples[warm : 2 * warm], samples[-warm:]
    ))
    growth = float(end / start - 1.0)
    files = max(f for *_, f in samples[-warm:]) - max(f for *_, f in samples[warm : 2 * warm])
    tally = load.tally
    return {
        **tally.to_dict(),
        "minutes": minutes,
        "switches": switches,
        "memory_mib": [round(m) for _, m, _ in samples[:: max(1, len(samples) // 10)]],
        "memory_growth": growth,
        "open_files_growth": files,
        "leaked_actors": sorted(_actors(group.name) - actors),
        "false_alarms": len(status["recoveries"]),
        "holds": growth <= GROWTH_BAR and files <= 8 and _actors(group.name) == actors
        and not status["recoveries"] and tally.wrong == tally.failed == 0,
    }


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
