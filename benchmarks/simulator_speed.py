"""`speed`: a thousand large steps on 256 devices, port sums included, and how that grows."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.simulator.pricing.step_composition import Composition
from loadmaster.simulator.pricing.step_router import Condition, StepRouter
from loadmaster.simulator.serving.replay import cost_all
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.trace import RoutingTrace

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 58, 256, 8, 7168, 2048
STEP_TOKENS, TRACE_TOKENS, STEPS = 16_384, 32_768, 1_000
THREADS = 2
MODEL = ModelSpec(name="deepseek-v3", num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K,
                  hidden=HIDDEN, intermediate=INTERMEDIATE, bytes_per_parameter=1.0)


def speed() -> dict[str, Any]:
    """Wall and CPU seconds of 1,000 steps; other sizes and `balanced` from fewer steps.

    In a process of its own, so that the memory is what these steps take.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_speed).result()


def _peak_gib() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kib = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    return int(kib) / 2**20


def _speed() -> dict[str, Any]:
    trace = _trace()
    main = _measure(trace, devices=256, policy="even", steps=STEPS)
    growth = [
        _measure(trace, devices=devices, policy="even", steps=60) for devices in (64, 256, 1024)
    ]
    as_stored = _measure(_layer_major(trace), devices=256, policy="even", steps=60)
    balanced = _measure(trace, devices=256, policy="balanced", steps=4)
    memory_gib = _peak_gib()
    per_step = {row["devices"]: row["cpu_ms_per_step"] for row in growth}
    linear = per_step[1024] / per_step[256] <= 4.0
    return {
        "holds": max(main["wall_s"], main["cpu_s"] / THREADS) <= 10.0 and memory_gib <= 2.0
        and linear,
        "wall_s": main["wall_s"], "cpu_s": main["cpu_s"],
        "seconds_on_two_free_cores": main["cpu_s"] / THREADS,
        "memory_gib": memory_gib,
        "growth_256_to_1024": per_step[1024] / per_step[256],
        "growth": growth,
        "as_stored": as_stored,
        "balanced": balanced | {"s_per_1000_steps_one_core": balanced["cpu_ms_per_step"]},
    }


def _layer_major(trace: RoutingTrace) -> RoutingTrace:
    """The same trace as `load_trace` lays it out in memory."""
    ids = np.ascontiguousarray(trace.ids.transpose(1, 0, 2)).transpose(1, 0, 2)
    return dataclasses.replace(trace, ids=ids)


def _measure(
    trace: RoutingTrace, *, devices: int, policy: str, steps: int
) -> dict[str, Any]:
    slots = max(512, devices)
    cluster = Cluster.preset("h100", nodes=devices // 8, devices_per_node=8,
                             slots_per_device=slots // devices)
    rng = np.random.default_rng(0)
    rows = [rng.permutation(np.arange(slots) % EXPERTS) for _ in range(LAYERS)]
    plan = Plan(np.stack(rows).reshape(LAYERS, devices, -1).astype(np.int16), EXPERTS,
                dispatch=DispatchSpec(policy=policy))
    router = StepRouter(trace, cluster, MODEL)
    cost_all(router, Condition(plan), _steps(trace, devices, 1))       # compile
    wall, cpu = time.perf_counter(), time.process_time()
    step_us, usage = cost_all(router, Condition(plan), _steps(trace, devices, steps))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert len(step_us) == steps and usage.port_us_PG.max() > 0
    return {"devices": devices, "dispatch": policy, "slots": slots, "steps": steps,
            "wall_s": wall, "cpu_s": cpu, "cpu_ms_per_step": cpu / steps * 1e3}


def _steps(trace: RoutingTrace, devices: int, steps: int) -> Iterator[Composition]:
    """Steps of tokens drawn from the trace, dealt to the ranks in turn."""
    rng = np.random.default_rng(1)
    home = np.arange(STEP_TOKENS) % devices
    for _ in range(steps):
        yield Composition(rng.integers(0, trace.num_tokens, STEP_TOKENS), home)


def _trace() -> RoutingTrace:
    """Skewed choices (popularity falls as a power law), other experts popular in each layer."""
    rng = np.random.default_rng(0)
    ids = np.empty((TRACE_TOKENS, LAYERS, TOP_K), np.uint8)
    skew = -0.5 * np.log(np.arange(EXPERTS) + 1.0).astype(np.float32)
    for layer in range(LAYERS):
        score = rng.gumbel(size=(TRACE_TOKENS, EXPERTS)).astype(np.float32) + rng.permutation(skew)
        ids[:, layer] = np.argpartition(-score, TOP_K, axis=1)[:, :TOP_K]
    return RoutingTrace.from_arrays(ids, num_experts=EXPERTS)
