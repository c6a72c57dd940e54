"""`serving`: an hour of a chat service on 64 devices, and what the bank costs in truth."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from simulator_data import DATA, absent, routing

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.planner import plan as make_plan
from loadmaster.simulator.pricing.memory import MemorySpec
from loadmaster.simulator.pricing.step_router import StepRouter
from loadmaster.simulator.serving.active_state import ActiveState
from loadmaster.simulator.serving.batching import Batch, BatchLimits
from loadmaster.simulator.serving.event_loop import ServingGroup, ServingLoop
from loadmaster.simulator.serving.every_step import EveryStep
from loadmaster.simulator.serving.result import SimulationResult, Slo
from loadmaster.simulator.serving.simulate import Serving, simulate
from loadmaster.simulator.serving.step_time_bank import StepBank
from loadmaster.simulator.serving.token_source import TokenSource
from loadmaster.simulator.serving.workload import Workload, as_workload
from loadmaster.traces.arrival_files import load_arrivals
from loadmaster.traces.model_spec import ModelSpec
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
        "holds": wall <= 60.0 and identical and worst <= 0.01,
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


class _Both:
    """Times steps by routing them, and asks the bank about the very same batches."""

    def __init__(self, exact: EveryStep, bank: StepBank) -> None:
        self.exact, self.bank = exact, bank
        self.rows: list[tuple[int, int, int]] = []

    def step_ns(self, batch: Batch, group: ServingGroup) -> int:
        exact_ns = self.exact.step_ns(batch, group)
        self.rows.append((batch.prefill_tokens, exact_ns, self.bank.step_ns(batch, group)))
        return exact_ns


def _bank_errors(
    plan: Plan, load: Workload, cluster: Cluster, trace: RoutingTrace
) -> dict[str, Any]:
    """The bank's summed step times over the routed ones, batch by batch; and whole runs apart."""
    router = StepRouter(trace, cluster, MODEL)
    active = ActiveState(router, plan, groups=1, seed=0)
    source = TokenSource(trace, load, seed=0)
    both = _Both(
        EveryStep(router, source, active),
        StepBank(router, source, load, active, largest=SERVING.limits.step_tokens, seed=0),
    )
    ServingLoop(load, both, SERVING.limits, num_devices=cluster.num_devices).run()
    prefill, exact_ns, bank_ns = np.array(both.rows).T
    parts = {"all": prefill >= 0, "with_prompts": prefill > 0, "answers_only": prefill == 0}
    exact, drawn = (
        _run(plan, load, cluster, trace, routing=r) for r in ("every_step", "bank")
    )
    return {
        "requests": len(load), "steps": len(exact_ns),
        "errors": {
            name: float(bank_ns[part].sum() / exact_ns[part].sum() - 1)
            for name, part in parts.items()
        },
        "errors_of_separate_runs": {
            name: getattr(drawn, name).mean / getattr(exact, name).mean - 1
            for name in ("step_time", "ttft", "tpot", "latency")
        },
    }
