"""The control loop over a scripted day, and what a plan is worth in wall time on two cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from live_load import STEP_TOKENS

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import Plan
from loadmaster.placement.planner import plan
from loadmaster.placement.policy import Policy
from loadmaster.traces.trace import RoutingTrace
from loadmaster.workers.controller import Control, Controller
from loadmaster.workers.demo_measure import predicted
from loadmaster.workers.expert_fit import RECORDED, ExpertFit, fit_kernel, machine, scale_to_live
from loadmaster.workers.group import Group, contiguous
from loadmaster.workers.reference import reference_model_dir
from loadmaster.workers.reference.prompts import DOMAINS, demo_prompts
from loadmaster.workers.settings import served_spec

RANKS, SLOTS = 4, 10
PROMPT_TOKENS = 512
WINDOW_STEPS = 8
# Twenty windows: all domains, then code, then another language, then all domains again.
DAY = [DOMAINS] * 5 + [("code",)] * 5 + [("japanese", "chinese")] * 5 + [DOMAINS] * 5
FLAT_WINDOWS = 5
MOVES_BAR = 0.15


def window_prompts(domains: Sequence[str], seed: int) -> tuple[list[list[int]], list[str]]:
    """Prompts that fill one window of prefill steps."""
    count = WINDOW_STEPS * STEP_TOKENS // PROMPT_TOKENS
    each = -(-count // len(domains))
    lists = [demo_prompts(d, each, PROMPT_TOKENS, seed) for d in domains]
    prompts = [list(ps[i]) for i in range(each) for ps in lists][:count]
    return prompts, [d for _ in range(each) for d in domains][:count]


def cluster_of(ranks: int) -> Cluster:
    return Cluster.preset("cpu", devices_per_node=ranks, slots_per_device=SLOTS)


def widened(standing: Plan) -> Plan:
    """The plan with empty slots up to SLOTS on each rank."""
    layers, ranks, width = standing.slots.shape
    slots = np.full((layers, ranks, SLOTS), -1, np.int16)
    slots[:, :, :width] = standing.slots
    return Plan(slots=slots, num_experts=standing.num_experts, dispatch=standing.dispatch)


def recorded(
    group: Group, domains: Sequence[str], kernel: ExpertFit, cluster: Cluster, seed: int = 3
) -> tuple[RoutingTrace, Cluster]:
    """A recorded window of prefill, and the cluster with this machine's times fitted to it."""
    prompts, labels = window_prompts(domains, seed)
    group.prefill(prompts, labels, step_tokens=STEP_TOKENS)
    group.record(True)
    first = group.step
    group.prefill(prompts, labels, step_tokens=STEP_TOKENS)
    steps = group.measurements(first)
    group.record(False)
    trace = group.trace(take=True)
    fit = scale_to_live(kernel, steps, trace, group.plan, cluster)
    hardware = machine(fit, group.model_spec, cluster.hardware)
    return trace, cluster.model_copy(update={"hardware": hardware})


# ---- the day ---------------------------------------------------------------------------------


def controller() -> dict[str, Any]:
    """Net benefit against never and every-n with full re-planning, on the same traffic."""
    spec = served_spec(reference_model_dir(), "bfloat16")
    kernel = fit_kernel(spec)
    start = _plan_for_mixed(kernel)
    never = _day(start, kernel, Control(Policy("never"), window_steps=WINDOW_STEPS))
    every = _day(
        start, kernel,
        Control(Policy("every_n", every_steps=1, fewest_tokens=1), window_steps=WINDOW_STEPS,
                candidates="replan", planning_shares_cores=True),
    )
    ours = _day(
        start, kernel,
        Control(Policy("net_benefit", every_steps=WINDOW_STEPS, fewest_tokens=4 * STEP_TOKENS,
                       horizon_steps=5.0 * WINDOW_STEPS), window_steps=WINDOW_STEPS),
    )
    decode = _decode_day(start, kernel)
    flat = sum(ours["moves_by_window"][:FLAT_WINDOWS])
    share = ours["moves"] / max(every["moves"], 1)
    return {
        "never": never, "every_n": every, "net_benefit": ours, "decode_moves": decode,
        "moves_share": share, "flat_moves": flat,
        "holds": ours["total_ms"] < never["total_ms"] and ours["total_ms"] < every["total_ms"]
        and share <= MOVES_BAR and flat == 0 and decode == 0,
    }


def _plan_for_mixed(kernel: ExpertFit) -> Plan:
    """What an operator would start the day with: planned on a mixed window before it."""
    with _group("day-before", None) as group:
        trace, cluster = recorded(group, DOMAINS, kernel, cluster_of(RANKS), seed=999)
        return plan(
            trace, cluster, objective="time", model=group.model_spec, steps=RECORDED,
            dispatch="balanced", effort="fast",
        ).plan


def _group(name: str, start: Plan | None) -> Group:
    spec = served_spec(reference_model_dir(), "bfloat16")
    standing = widened(contiguous(spec, RANKS)) if start is None else start
    return Group.start(reference_model_dir(), standing, ranks=RANKS, name=name)


def _day(start: Plan, kernel: ExpertFit, control: Control) -> dict[str, Any]:
    """Serve the day under a policy: critical-path expert time plus what migration took."""
    with _group(f"day-{control.policy.name.replace('_', '-')}", start) as group:
        group.prefill(*window_prompts(DOMAINS, 998), step_tokens=STEP_TOKENS)
        group.record(True)
        loop = Controller(group, cluster_of(RANKS), control, kernel=kernel)
        critical_us, moves = [], []
        stall_us = 0.0
        for number, domains in enumerate(DAY):
            first, before = group.step, group.plan
            group.prefill(*window_prompts(domains, number), step_tokens=STEP_TOKENS)
            served = group.measurements(first)
            entry = loop.tick()
            critical_us.append(float(served.critical_us.sum()))
            stall_us += entry.numbers.get("stage_us", 0.0) + entry.numbers.get("commit_us", 0.0)
            moves.append(len(before.moves_to(group.plan)))
        answers = [e.answer for e in loop.entries]
    return {
        "total_ms": (sum(critical_us) + stall_us) / 1e3,
        "critical_ms": sum(critical_us) / 1e3,
        "stall_ms": stall_us / 1e3,
        "moves": sum(moves),
        "moves_by_window": moves,
        "critical_ms_by_window": [round(us / 1e3, 1) for us in critical_us],
        "answers": answers,
        "reasons": [e.reason for e in loop.entries],
    }


def _decode_day(start: Plan, kernel: ExpertFit) -> int:
    """Moves made while only new tokens are generated: small experts, small steps."""
    control = Control(
        Policy("net_benefit", every_steps=32, fewest_tokens=1000, horizon_steps=160.0),
        window_steps=32,
    )
    with _group("day-decode", start) as group:
        loop = Controller(group, cluster_of(RANKS), control, kernel=kernel)
        moves = 0
        for number, domains in enumerate((DOMAINS, DOMAINS, ("code",), ("japanese",))):
            prompts, labels = window_prompts(domains, number)
            short = [p[:32] for p in prompts[:48]]
            group.record(False)
            group.prefill(short, labels[:48])
            before = group.plan
            group.record(True)
            group.generate(short, 32, labels[:48])
            loop.tick()
            moves += len(before.moves_to(group.plan))
    return moves


# ---- two ranks on two cores --------------------------------------------------------------------


def two_ranks_wall(*, rounds: int = 8) -> dict[str, Any]:
    """Wall time per step under `contiguous` and `auto`, against what the plan promised.

    The two plans take turns on the same traffic, so that what else the machine does biases neither.
    """
    spec = served_spec(reference_model_dir(), "bfloat16")
    kernel = fit_kernel(spec)
    domains = ("code",)
    width = spec.num_experts // 2
    slots = width + 2
    base = contiguous(spec, 2)
    padded = np.full((spec.num_layers, 2, slots), -1, np.int16)
    padded[:, :, :width] = base.slots
    standing = Plan(slots=padded, num_experts=spec.num_experts, dispatch=base.dispatch)
    with Group.start(reference_model_dir(), standing, ranks=2, name="two-ranks") as group:
        _pin(group.status()["pids"])
        cluster = Cluster.preset("cpu", devices_per_node=2, slots_per_device=slots)
        trace, fitted = recorded(group, domains, kernel, cluster)
        better = plan(
            trace, fitted, objective="time", model=spec, steps=RECORDED, dispatch="balanced",
            effort="normal",
        ).plan
        judged, _ = recorded(group, domains, kernel, cluster, seed=5)
        walls: dict[str, list[float]] = {"contiguous": [], "auto": []}
        paths: dict[str, list[float]] = {"contiguous": [], "auto": []}
        prompts, labels = window_prompts(domains, 5)
        for turn in range(rounds):
            order = ("contiguous", "auto") if turn % 2 else ("auto", "contiguous")
            for name in order:
                group.apply(standing if name == "contiguous" else better)
                first = group.step
                group.prefill(prompts, labels, step_tokens=STEP_TOKENS)
                steps = group.measurements(first)
                whole = steps.rows.sum(axis=1) >= 0.9 * STEP_TOKENS
                walls[name].append(float(steps.step_wall_us[whole].mean()))
                paths[name].append(float(steps.critical_us[whole].mean()))
        gain_us = (
            predicted(standing, judged, fitted, spec, None).critical_path_us
            - predicted(better, judged, fitted, spec, None).critical_path_us
        )
    return _wall_verdict(walls, paths, gain_us)


def _wall_verdict(
    walls: dict[str, list[float]], paths: dict[str, list[float]], gain_us: float
) -> dict[str, Any]:
    now, new = np.array(walls["contiguous"]), np.array(walls["auto"])
    measured = float(1.0 - np.mean(new) / np.mean(now))
    promised = float(gain_us / np.mean(now))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(now), (4000, len(now)))
    gains = 1.0 - new[drawn].mean(axis=1) / now[drawn].mean(axis=1)
    low, high = (float(q) for q in np.quantile(gains, [0.025, 0.975]))
    near = abs(measured - promised) <= 0.03 or low <= promised <= high
    return {
        "measured_gain": measured, "measured_band": [low, high], "predicted_gain": promised,
        "step_wall_ms": {k: float(np.mean(v)) / 1e3 for k, v in walls.items()},
        "critical_ms": {k: float(np.mean(v)) / 1e3 for k, v in paths.items()},
        "holds": near and np.sign(measured) == np.sign(promised),
    }


def _pin(pids: Sequence[int]) -> None:
    """Each rank's threads to a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    for pid, core in zip(pids, cores, strict=False):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), {core})
