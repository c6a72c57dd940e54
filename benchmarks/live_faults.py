"""Dying ranks, hanging ranks, flipped bits."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import torch
from live_load import Load, random_plan, text_prompts

from loadmaster.errors import LoadmasterError
from loadmaster.workers.group import run_folder
from loadmaster.workers.group.group import Group
from loadmaster.workers.rank.expert_store import ExpertStore
from loadmaster.workers.rank.model import MoeCheckpoint, fingerprint
from loadmaster.workers.rank.staging import Staging, to_bytes
from loadmaster.workers.reference import reference_model_dir

RECOVERY_BAR_S = 30.0


KINDS = ("serving", "staging", "committing")
ATTEMPTS = 3
SEEN_S, BACK_S = 20.0, 120.0      # until a switch is where it should be; until a rank is back


def recovery(group: Group, *, kills: int = 10, seed: int = 0) -> dict[str, Any]:
    """SIGKILL of a random rank at random moments; every third while experts move, every third
    while the switch commits. A moment that could not be hit is tried again, and then said."""
    rng = np.random.default_rng(seed)
    prompts, _ = text_prompts(48, 384)
    want = group.generate(prompts, 8)
    events = []
    with Load(group, prompts, 8, want) as load:
        for number in range(kills):
            time.sleep(float(rng.uniform(1.0, 4.0)))
            events.append(_kill(group, KINDS[number % 3], rng, number))
    tally = load.tally
    back = [e["seconds"] for e in events if e["seconds"] is not None]
    missed = [e for e in events if not e["hit"]]
    return {
        **tally.to_dict(),
        "events": events,
        "missed_moments": len(missed),
        "worst_seconds": max(back) if len(back) == len(events) else None,
        "holds": tally.clean and not missed and len(back) == len(events)
        and max(back) <= RECOVERY_BAR_S,
    }


def _kill(group: Group, kind: str, rng: np.random.Generator, number: int) -> dict[str, Any]:
    """One kill, at the moment asked for: `hit` says whether the switch was there when it fell."""
    status = group.status()
    before, pids = len(status["recoveries"]), status["pids"]
    victim = int(rng.integers(0, len(pids)))
    outcome: list[str] = []
    hit, thread = kind == "serving", None
    for attempt in range(ATTEMPTS):
        if hit:
            break
        if thread is not None:
            thread.join(BACK_S)
        thread = threading.Thread(
            target=_try_apply, args=(group, 1000 * attempt + number, outcome)
        )
        thread.start()
        hit = _reached(group, kind, rng)
    killed_at = time.time()
    os.kill(pids[victim], signal.SIGKILL)
    back = _await(lambda: len(group.status()["recoveries"]) > before, BACK_S)
    if thread is not None:
        thread.join(BACK_S)
    event = {"kind": kind, "rank": victim, "hit": hit, "noticed_seconds": None, "seconds": None,
             "switch": outcome[-1] if outcome else None}
    if back:
        last = group.status()["recoveries"][before]
        event["noticed_seconds"] = round(last.noticed_at - killed_at, 2)
        event["seconds"] = round(last.noticed_at + last.seconds - killed_at, 2)
    return event


def _reached(group: Group, kind: str, rng: np.random.Generator) -> bool:
    """Wait for the moment of the switch that has just been asked for."""
    if kind == "committing":
        return _await(lambda: _committing(group), SEEN_S, every_s=0.001)
    if not _await(lambda: group.status()["switching"], SEEN_S, every_s=0.005):
        return False
    time.sleep(float(rng.uniform(0.0, 0.3)))       # somewhere between the first byte and the last
    return bool(group.status()["switching"]) and not _committing(group)


def _committing(group: Group) -> bool:
    """Whether the committing step runs now: as the group says, or else its journal, whose last
    line is `commit` from just before that step until just after it."""
    told = group.status().get("committing")
    if told is not None:
        return bool(told)
    path = run_folder.group_folder(group.name) / "journal" / "journal.jsonl"
    last = path.read_text(encoding="utf-8").splitlines()[-1:]
    return bool(last) and '"commit"' in last[0]


def _try_apply(group: Group, seed: int, outcome: list[str]) -> None:
    plan = random_plan(group.model_spec, group.plan.num_devices, 500 + seed)
    try:
        group.apply(plan)
        outcome.append("committed")
    except LoadmasterError as error:
        outcome.append(f"aborted: {error}")


def _await(condition: Any, timeout_s: float, *, every_s: float = 0.05) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(every_s)
    return False


def hang(group: Group, *, times: int = 3) -> dict[str, Any]:
    """SIGSTOP of a rank: how long until the group acts, against its own promise."""
    prompts, _ = text_prompts(48, 384)
    want = group.generate(prompts, 8)
    events = []
    with Load(group, prompts, 8, want) as load:
        for number in range(times):
            time.sleep(6.0)
            events.append(_stop_a_rank(group, number))
    tally = load.tally
    return {**tally.to_dict(), "events": events,
            "holds": all(e["holds"] for e in events) and tally.clean}


def _stop_a_rank(group: Group, number: int) -> dict[str, Any]:
    steps = group.measurements(max(0, group.step - 200))
    if not len(steps.step):
        return {"holds": False, "reason": "no steps to take the limit from"}
    limit_s = max(5e-6 * float(np.quantile(steps.step_wall_us, 0.99)), 1.0) + 1.0
    before = len(group.status()["recoveries"])
    stopped_at = time.time()
    os.kill(group.status()["pids"][number % group.plan.num_devices], signal.SIGSTOP)
    if not _await(lambda: len(group.status()["recoveries"]) > before, BACK_S):
        return {"holds": False, "reason": f"not noticed in {BACK_S:.0f} s"}
    noticed_s = group.status()["recoveries"][before].noticed_at - stopped_at
    return {"noticed_seconds": round(noticed_s, 2), "limit_seconds": round(limit_s, 2),
            "holds": noticed_s <= limit_s}


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
                raise RuntimeError(f"a whole expert {key} was refused")
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
