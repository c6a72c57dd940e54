"""`serving`: an hour of a production chat service on 64 devices, and what the bank costs in truth."""

from __future__ import annotations

import time
from typing import Any

from simulator_data import DATA, absent, routing

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import Plan
from loadmaster.placement.planner import plan as make_plan
from loadmaster.simulator.batching import BatchLimits
from loadmaster.simulator.memory import MemorySpec
from loadmaster.simulator.result import SimulationResult, Slo
from loadmaster.simulator.serve import Serving, simulate
from loadmaster.simulator.workload import Workload, as_workload
from loadmaster.traces.arrivals import load_arrivals
from loadmaster.traces.spec import ModelSpec
from loadmaster.traces.trace import RoutingTrace

# gpt-oss-20b: 24 layers, 4-bit weights with scales, 8 KV heads of 64, bf16.
MODEL = ModelSpec(name="gpt-oss-20b", num_layers=24, num_experts=32, top_k=4, hidden=2880,
                  intermediate=2880, bytes_per_parameter=0.53, other_time_us=4_000.0)
SERVING = Serving(BatchLimits(step_tokens=8192, max_requests=1024),
                  MemorySpec(kv_bytes_per_token=24 * 2 * 8 * 64 * 2))
SLO = Slo(ttft_us=1e6, tpot_us=5e4)
# Of the hour, so much is also routed step by step: as it is, and eight times as dense.
CHECKED_US = 60e6


def serving() -> dict[str, Any]:
    """Time of the hour, twice for identity; the bank against routing every step on a part."""
    if not DATA.is_dir():
        return absent()
    trace = routing("gptoss20b_decode")
    cluster = Cluster.preset("h100", nodes=8, devices_per_node=8, slots_per_device=1)
    plan = make_plan(trace, cluster, method="eplb").plan
    hour = as_workload(load_arrivals(DATA / "arrivals" / "azure_conv_2023.csv"))
    _run(plan, hour.head(50), cluster, trace)       # compile
    wall, cpu = time.perf_counter(), time.process_time()
    result = _run(plan, hour, cluster, trace)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    identical = _run(plan, hour, cluster, trace).to_json() == result.to_json()
    errors = {
        "steady": _bank_errors(plan, hour.until(CHECKED_US), cluster, trace),
        "eight_times_the_load": _bank_errors(
            plan, hour.scaled(8.0).until(CHECKED_US / 4), cluster, trace
        ),
    }
    worst = max(max(abs(e) for e in part["errors"].values()) for part in errors.values())
    return {
        "holds": cpu <= 60.0 and identical and worst <= 0.01,
        "wall_s": wall, "cpu_s": cpu, "identical": identical, "bank_worst_error": worst,
        "bank": errors, "requests": len(hour), "steps": len(result.steps),
        "ttft_ms": {"p50": result.ttft.p50 / 1e3, "p99": result.ttft.p99 / 1e3},
        "tpot_ms": {"p50": result.tpot.p50 / 1e3, "p99": result.tpot.p99 / 1e3}
        if result.tpot else None,
        "goodput_requests_per_s": result.goodput_requests_per_s,
        "shares": result.blame.shares,
    }


def _run(
    plan: Plan, load: Workload, cluster: Cluster, trace: RoutingTrace, **more: Any
) -> SimulationResult:
    return simulate(plan, load, cluster, trace=trace, model=MODEL, serving=SERVING, slo=SLO, **more)


def _bank_errors(
    plan: Plan, load: Workload, cluster: Cluster, trace: RoutingTrace
) -> dict[str, Any]:
    """Relative errors of what the bank predicts for `load` against routing each of its steps."""
    exact = _run(plan, load, cluster, trace, routing="every_step")
    drawn = _run(plan, load, cluster, trace)
    pairs = {
        "mean_step": (drawn.step_time.mean, exact.step_time.mean),
        "mean_ttft": (drawn.ttft.mean, exact.ttft.mean),
        "mean_latency": (drawn.latency.mean, exact.latency.mean),
        "expert_critical_path": (drawn.blame.critical_path_us, exact.blame.critical_path_us),
    }
    if drawn.tpot and exact.tpot:
        pairs["mean_tpot"] = (drawn.tpot.mean, exact.tpot.mean)
    return {
        "requests": len(load), "steps": len(exact.steps),
        "errors": {name: ours / theirs - 1 for name, (ours, theirs) in pairs.items()},
    }
