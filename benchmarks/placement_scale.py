"""Planning at full size: loads of the synthetic families, churn, DeepSeek-V3, time, a million.

Figures are means over three seeds. `seconds` is wall time of the planning call on the cores this
process may use, `cpu_s` what it took on all of them; compilation has happened before and is given
as `compile_s`. Where memory counts, the section runs in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.evaluate import evaluate
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.planner import PlanResult, plan
from loadmaster.placement.rebalancing.rebalance import rebalance
from loadmaster.placement.search.balance_score import even_device_load
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import FAMILIES, instance, synth_trace, zipf_shares

SEEDS = (0, 1, 2)
Array = npt.NDArray[Any]
Section = dict[str, Any]

# family: (most max/mean, most seconds)
WANTED = {"a288": (1.0005, 0.5), "a320": (1.0005, 0.5), "b320": (1.0015, 1.0), "c512": (1.01, 3.0)}


def family_cluster(name: str) -> Cluster:
    """The cluster a family is planned for."""
    family = FAMILIES[name]
    return Cluster.preset(
        "h100", nodes=family.nodes, devices_per_node=family.devices // family.nodes,
        slots_per_device=family.slots // family.devices,
    )


def even_imbalance(made: Plan, load_LE: Array) -> float:
    """Mean over layers of max/mean device load when copies share an expert's load evenly."""
    load_LG = np.stack(
        [even_device_load(load_E, slots) for load_E, slots in zip(load_LE, made.slots, strict=True)]
    )
    return float((load_LG.max(axis=1) / load_LG.mean(axis=1)).mean())


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, wall seconds, CPU seconds of all threads)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def synthetic(name: str) -> Section:
    """Packing average loads under an even split, no duplicates; EPLB beside."""
    most, limit_s = WANTED[name]
    cluster, rows = family_cluster(name), []
    compile_s = timed(lambda: _plan_loads(name, 99, cluster, layers=1))[1]
    for seed in SEEDS:
        load_LE = instance(name, 1.0, seed).load_LE.astype(np.float64)
        made, wall, cpu = timed(partial(_plan_loads, name, seed, cluster))
        beside = plan(Profile.from_loads(load_LE), cluster, method="eplb", dispatch="even").plan
        rows.append((even_imbalance(made.plan, load_LE), even_imbalance(beside, load_LE), wall,
                     cpu, made.plan.duplicates))
    ratio, eplb, wall, cpu, duplicates = (float(x) for x in np.mean(rows, axis=0))
    return {
        "holds": ratio <= most and wall <= limit_s and duplicates == 0,
        "max_over_mean": ratio, "wanted": most, "eplb": eplb, "seconds": wall,
        "seconds_wanted": limit_s, "cpu_s": cpu, "duplicates": duplicates, "compile_s": compile_s,
    }


def _plan_loads(name: str, seed: int, cluster: Cluster, layers: int | None = None) -> PlanResult:
    load_LE = instance(name, 1.0, seed).load_LE[:layers]
    return plan(Profile.from_loads(load_LE), cluster, method="auto", dispatch="even")


def churn() -> Section:
    """a288 after lognormal(0.3) drift with a tenth of the slots moved; and with nothing changed."""
    cluster, rows = family_cluster("a288"), []
    slots = FAMILIES["a288"].slots * FAMILIES["a288"].layers
    for seed in SEEDS:
        drawn = instance("a288", 1.0, seed)
        current_plan = _plan_loads("a288", seed, cluster).plan

        def again(load_LE: Array, current_plan: Plan = current_plan) -> PlanResult:
            return rebalance(
                current_plan, Profile.from_loads(load_LE), cluster, max_moves=slots // 10,
                dispatch="even",
            )

        drifted, wall, cpu = timed(partial(again, drawn.drifted_LE))
        rows.append((
            even_imbalance(current_plan, drawn.drifted_LE), even_imbalance(drifted.plan,
            drawn.drifted_LE), len(drifted.moves) / slots, len(again(drawn.next_LE).moves), wall,
            cpu,
        ))
    stale, after, moved, idle_moves, wall, cpu = (float(x) for x in np.mean(rows, axis=0))
    return {
        "holds": after <= 1.03 and moved <= 0.1 and idle_moves == 0,
        "max_over_mean": after, "wanted": 1.03, "standing_plan": stale, "slots_moved": moved,
        "moves_when_nothing_changed": idle_moves, "seconds": wall, "cpu_s": cpu,
    }


# ---- whole models ------------------------------------------------------------------------------


def alone(function: Callable[[], Section]) -> Section:
    """Run in a fresh process, so that its peak memory is the section's own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_with_peak, function).result()


def _with_peak(function: Callable[[], Section]) -> Section:
    found = function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    most = found["peak_gib_wanted"]
    return found | {"holds": found["holds"] and peak <= most, "peak_gib": peak}


def deepseek_v3() -> Section:
    """58 x 256 experts, 320 slots on 32 devices in 4 nodes; unseen steps of 8,192 tokens."""
    rows = [alone(partial(_deepseek_v3, seed)) for seed in SEEDS]
    means = {k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k != "holds"}
    return {"holds": all(r["holds"] for r in rows)} | means


def _deepseek_v3(seed: int) -> Section:
    cluster = Cluster.preset("h100", nodes=4, devices_per_node=8, slots_per_device=10)
    steps = StepSampler(tokens=8192, seed=0)
    trace = synth_trace(
        layers=58, experts=256, top_k=8, tokens=300_000, zipf=1.0, domains=8,
        switch_tokens=20_000, seed=seed,
    )
    known, unseen = trace.split(0.5, seed=seed)
    del trace
    compile_s = timed(lambda: plan(
        synth_trace(layers=1, tokens=40_000, seed=99), cluster, steps=steps, effort="fast"
    ))[1]
    made, wall, cpu = timed(lambda: plan(known, cluster, method="auto", steps=steps))
    rival = plan(known, cluster, method="eplb", steps=steps).plan

    def judged(one: Plan, dispatch: str) -> float:
        return evaluate(one, unseen, cluster, steps=steps, dispatch=dispatch).imbalance_mean

    reached = judged(made.plan, "balanced")
    even, balanced = judged(rival, "even"), judged(rival, "balanced")
    return {
        "holds": (wall <= 30 and reached <= 1.005 and reached < min(even, balanced)
                  and made.evidence.gap <= 0.03),
        "unseen": reached, "unseen_wanted": 1.005, "eplb_even": even, "eplb_balanced": balanced,
        "gap": made.evidence.gap, "gap_wanted": 0.03, "seconds": wall, "seconds_wanted": 30,
        "cpu_s": cpu, "peak_gib_wanted": 2.0, "compile_s": compile_s,
    }


def million() -> Section:
    """1,000,000 experts, placed as groups of 64 in one layer over 1,024 devices."""
    rows = [alone(partial(_million, seed)) for seed in SEEDS]
    means = {k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k != "holds"}
    return {"holds": all(r["holds"] for r in rows)} | means


def _million(seed: int) -> Section:
    experts, group, devices = 1_000_000, 64, 1024
    rng = np.random.default_rng(seed)
    share_E = zipf_shares(rng, 1, experts, 1.0, cap=1 / 64)[0]
    load_E = rng.multinomial(200_000_000, share_E)
    load_LE = load_E.reshape(1, -1, group).sum(axis=2)
    groups = load_LE.shape[1]
    cluster = Cluster.preset(
        "h100", nodes=devices // 8, slots_per_device=-(-groups // devices)
    )
    compile_s = timed(lambda: _plan_loads("a288", 99, family_cluster("a288"), layers=1))[1]
    made, wall, cpu = timed(
        lambda: plan(Profile.from_loads(load_LE), cluster, method="auto", dispatch="even")
    )
    beside = plan(Profile.from_loads(load_LE), cluster, method="contiguous", dispatch="even")
    return {
        "holds": wall <= 60, "groups": groups, "slots": cluster.total_slots,
        "max_over_mean": even_imbalance(made.plan, load_LE), "bound": made.evidence.bound,
        "gap": made.evidence.gap, "contiguous": even_imbalance(beside.plan, load_LE),
        "seconds": wall, "seconds_wanted": 60, "cpu_s": cpu, "peak_gib_wanted": 4.0,
        "compile_s": compile_s,
    }


SECTIONS: dict[str, Callable[[], Section]] = {
    **{f"synthetic.{name}": partial(synthetic, name) for name in WANTED},
    "churn": churn,
    "deepseek_v3": deepseek_v3,
    "million": million,
}
