"""Switching plans under load: the same bits, no lost request, little delay, only what must move."""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from live_load import (
    STEP_TOKENS,
    Load,
    random_plan,
    random_prompts,
    swapped_plan,
    text_prompts,
)
from random_checkpoint import save_random_checkpoint

from loadmaster.placement.plan import Plan
from loadmaster.workers.coordinator.step_log import Measurements
from loadmaster.workers.group.group import Group
from loadmaster.workers.protocol.plan_switch import ApplyReport
from loadmaster.workers.protocol.settings import Limits

SLOWDOWN_BAR, COMMIT_BAR = 1.25, 2.0


def identical(group: Group, *, requests: int = 200, new_tokens: int = 16) -> dict[str, Any]:
    """Outputs of a run without switches against two runs with five switches each."""
    prompts, _ = text_prompts(requests, 320)
    want = group.generate(prompts, new_tokens)
    runs = []
    for run in range(2):
        got: list[list[list[int]]] = []
        thread = threading.Thread(
            target=lambda got=got: got.append(group.generate(prompts, new_tokens))
        )
        thread.start()
        under_load = 0
        for switch in range(5):
            plan = random_plan(group.model_spec, group.plan.num_devices, 10 * run + switch)
            group.apply(plan)
            under_load += thread.is_alive()
        thread.join()
        runs.append({"same": got[0] == want, "switches": 5, "under_load": under_load})
    holds = all(r["same"] and r["under_load"] == 5 for r in runs)
    return {"requests": requests, "runs": runs, "holds": holds}


def failed_requests(group: Group, *, switches: int = 20) -> dict[str, Any]:
    """Requests that failed or came out wrong over twenty switches under continuous load."""
    prompts, _ = text_prompts(48, 384)
    want = group.generate(prompts, 8)
    moves = []
    with Load(group, prompts, 8, want) as load:
        for switch in range(switches):
            before = group.plan
            target = random_plan(group.model_spec, before.num_devices, 100 + switch)
            report = group.apply(target)
            moves.append(_moved(group, before, target, report))
    tally = load.tally
    return {
        **tally.to_dict(),
        "switches": switches,
        "moved_bytes": moves[-1],
        "moved_bytes_holds": all(m["holds"] for m in moves),
        "holds": tally.clean,
    }


def _moved(group: Group, before: Plan, target: Plan, report: Any) -> dict[str, Any]:
    triples = before.moves_to(target)
    expected = len(triples) * int(group.model_spec.bytes_per_expert_E()[0])
    same = [tuple(m) for m in report.moved] == triples and report.moved_bytes == expected
    return {"triples": len(triples), "moved_bytes": report.moved_bytes,
            "expected_bytes": expected, "retried_bytes": report.retried_bytes, "holds": same}


def moved_bytes(group: Group) -> dict[str, Any]:
    """What a switch moved against what it had to."""
    before = group.plan
    target = random_plan(group.model_spec, before.num_devices, 77)
    return _moved(group, before, target, group.apply(target))


# ---- how much serving slows ------------------------------------------------------------------


def switch_slowdown(group: Group, *, switches: int = 10) -> dict[str, Any]:
    """Steps while experts move against steps beside them, on this group's model."""
    prompts, _ = text_prompts(64, 512)
    want = group.generate(prompts, 2)
    with Load(group, prompts, 2, want) as load:
        found = _slowdown(group, switches, lambda plan, seed: swapped_plan(plan, 0.5, seed))
    return _with_tally(found, load)


def _with_tally(found: dict[str, Any], load: Load) -> dict[str, Any]:
    tally = load.tally
    return {**found, **tally.to_dict(), "holds": found["holds"] and tally.clean}


def large_switch_slowdown(*, ranks: int = 4, switches: int = 3) -> dict[str, Any]:
    """The same on a random checkpoint of more than 1 GiB of experts."""
    sizes = {"layers": 8, "experts": 96, "hidden": 512, "intermediate": 512, "top_k": 2}
    with tempfile.TemporaryDirectory() as scratch:
        directory = save_random_checkpoint("qwen3_moe", Path(scratch) / "large", **sizes)
        size_bytes = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
        with Group.start(
            directory, ranks=ranks, name="large", limits=Limits(STEP_TOKENS, 512, 64)
        ) as group:
            prompts = random_prompts(64, 512, 256)
            want = group.generate(prompts, 2)
            with Load(group, prompts, 2, want) as load:
                found = _slowdown(group, switches, lambda plan, seed: swapped_plan(plan, 0.2, seed))
    found = _with_tally(found, load)
    return {"checkpoint_gib": size_bytes / 2**30, **found}


@dataclass
class _Samples:
    """What the switches showed: ratios to the plain steps around each, and wall times."""

    ratios: list[float] = field(default_factory=list)
    commits: list[float] = field(default_factory=list)
    staging_us: list[float] = field(default_factory=list)
    plain_us: list[float] = field(default_factory=list)

    def add(self, m: Measurements, report: ApplyReport) -> None:
        """The steps around one switch; only full ones are compared. Reading what is staged once
        more before the commit counts to the committing step."""
        full = m.rows.sum(axis=1) >= 0.9 * STEP_TOKENS
        commit = m.epoch == report.epoch
        commit[np.flatnonzero(commit)[1:]] = False
        staging, plain = m.staging & ~commit & full, ~m.staging & ~commit & full
        if not staging.any() or not plain.any():
            return
        paired = np.median(m.step_wall_us[plain])
        self.ratios.append(float(np.median(m.step_wall_us[staging]) / paired))
        committing_us = m.step_wall_us[commit & full] + report.verify_us
        self.commits.extend((committing_us / paired).tolist())
        self.staging_us.extend(m.step_wall_us[staging].tolist())
        self.plain_us.extend(m.step_wall_us[plain].tolist())


def _slowdown(group: Group, switches: int, next_plan: Any) -> dict[str, Any]:
    seen = _Samples()
    for switch in range(switches):
        first = group.step
        report = group.apply(next_plan(group.plan, switch))
        ends = group.step + report.stage_steps + 4
        deadline = time.monotonic() + 120.0
        while group.step < ends:
            if time.monotonic() > deadline:
                return {"holds": False, "reason": "the load stopped: no steps for two minutes"}
            time.sleep(0.05)
        seen.add(group.measurements(first), report)
    if not seen.ratios or not seen.commits:
        return {
            "holds": False,
            "reason": f"of {switches} switches, {len(seen.ratios)} had full steps staging and "
            f"beside, {len(seen.commits)} a full committing step: nothing to compare",
        }
    stage, commit = float(np.median(seen.ratios)), float(np.median(seen.commits))
    return {
        "median_while_staging": stage,
        "median_commit": commit,
        "switches_compared": len(seen.ratios),
        "staging_steps": len(seen.staging_us),
        "plain_median_ms": float(np.median(seen.plain_us)) / 1e3,
        "staging_p99_ms": float(np.quantile(seen.staging_us, 0.99)) / 1e3,
        "staging_worst_ms": max(seen.staging_us) / 1e3,
        "commit_worst": max(seen.commits),
        "holds": stage <= SLOWDOWN_BAR and commit <= COMMIT_BAR,
    }
