"""Chrome trace events of a simulated run: opens in Perfetto, one track per device and port.

All steps appear on the track of their group; the first ones also layer by layer: dispatch, experts
and wait of every device, and what each port carried. Knows results and the cost model. Knows
nothing of the clock of this machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...foundation.arrays import FloatArray
from ...foundation.atomic_file import replacing
from ...placement.cost.step_cost import StepCost, step_cost
from ...placement.cost.step_loads import StepLoads
from ...placement.plan import Plan
from ..pricing.step_router import MIRROR, PORTS, StepRouter, copy_us, port_transfers
from ..serving.result import SimulationResult

STEPS, DEVICES, LINKS = 1, 2, 3
MOST_STEPS, MOST_DETAILS = 20_000, 60_000    # events, so that a browser still opens the file


def chrome_events(
    result: SimulationResult, plan: Plan, router: StepRouter
) -> list[dict[str, Any]]:
    """Trace events; `plan` is the one the run started with. Times in microseconds.

    Layers of a step are scaled to the time it took in the run (a step of the bank represents it).
    """
    events = [_name("process_name", STEPS, 0, "serving groups")]
    steps = result.steps
    for w in range(min(len(steps), MOST_STEPS)):
        events.append(_span(
            f"step {w}", STEPS, int(steps.group[w]), steps.start_ns[w] / 1e3,
            steps.duration_ns[w] / 1e3,
            {"prompt tokens": int(steps.prefill_tokens[w]),
             "answer tokens": int(steps.decode_tokens[w]), "epoch": int(steps.epoch[w])},
        ))
    for event in result.events:
        events.append({"name": event.kind, "ph": "i", "s": "g", "ts": event.at_us, "pid": STEPS,
                       "tid": 0, "args": {"detail": event.detail, "pause_us": event.pause_us}})
    devices = router.cluster.num_devices
    per_step = router.model.num_layers * devices * 6
    shown = min(len(result.first_steps), len(steps), max(1, MOST_DETAILS // per_step))
    if shown:
        events += _tracks(devices)
        events += _details(result, plan, router, shown)
    return events


def write_chrome_trace(
    path: str | Path, result: SimulationResult, plan: Plan, router: StepRouter
) -> None:
    """Write the events as one JSON file, whole or not at all."""
    trace = {"traceEvents": chrome_events(result, plan, router), "displayTimeUnit": "ms"}
    with replacing(Path(path)) as file:
        file.write(json.dumps(trace, separators=(",", ":")).encode())


def _details(
    result: SimulationResult, plan: Plan, router: StepRouter, shown: int
) -> list[dict[str, Any]]:
    compositions = list(result.first_steps[:shown])
    loads = router.loads(compositions, plan)
    cost = step_cost(loads, router.model, router.cluster,
                     dispatch=router.dispatch or plan.dispatch, overlap=router.overlap)
    port_us = _port_us(loads, router)
    events: list[dict[str, Any]] = []
    for w in range(shown):
        took_us = result.steps.duration_ns[w] / 1e3
        scale = took_us / float(cost.step_us_W[w])
        clock = result.steps.start_ns[w] / 1e3
        for layer in range(router.model.num_layers):
            events += _layer(cost, port_us, w, layer, clock, scale)
            clock += float(cost.layer_us_WL[w, layer]) * scale
    return events


def _layer(
    cost: StepCost, port_us: FloatArray, w: int, layer: int, clock: float, scale: float
) -> list[dict[str, Any]]:
    """Dispatch, experts, wait and combine of one layer on every device, and its busy ports."""
    dispatch = float(cost.dispatch_us_WL[w, layer]) * scale
    combine = float(cost.combine_us_WL[w, layer]) * scale
    compute_G = cost.compute_us_WLG[w, layer] * scale
    slowest = float(compute_G.max())
    begin = clock + float(cost.counts_us_L[layer]) * scale
    events = []
    for g, own in enumerate(compute_G.tolist()):
        events.append(_span(f"dispatch L{layer}", DEVICES, g, begin, dispatch))
        events.append(_span(f"experts L{layer}", DEVICES, g, begin + dispatch, own))
        events.append(_span(f"wait L{layer}", DEVICES, g, begin + dispatch + own, slowest - own))
        events.append(_span(f"combine L{layer}", DEVICES, g, begin + dispatch + slowest, combine))
    devices = len(compute_G)
    starts = (begin, begin + dispatch + slowest)
    for direction, (label, start) in enumerate(zip(("dispatch", "combine"), starts, strict=True)):
        for p in range(len(PORTS)):
            for g in range(devices):
                us = float(port_us[direction, p, w, layer, g]) * scale
                events.append(_span(f"{label} L{layer}", LINKS, p * devices + g, start, us))
    return [e for e in events if e["dur"] > 0]


def _port_us(loads: StepLoads, router: StepRouter) -> FloatArray:
    """[2, P, W, L, G] time each port carries dispatch and combine."""
    to_P, back_P = copy_us(router.model, router.cluster)
    transfers = port_transfers(loads)
    shape = (-1, 1, 1, 1)
    return np.stack([transfers * to_P.reshape(shape), transfers[MIRROR] * back_P.reshape(shape)])


def _tracks(devices: int) -> list[dict[str, Any]]:
    names = [_name("process_name", DEVICES, 0, "devices"), _name("process_name", LINKS, 0, "ports")]
    names += [_name("thread_name", DEVICES, g, f"device {g}") for g in range(devices)]
    names += [
        _name("thread_name", LINKS, p * devices + g, f"{port} of device {g}")
        for p, port in enumerate(PORTS) for g in range(devices)
    ]
    return names


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _span(
    name: str, pid: int, tid: int, start: float, dur: float, args: dict[str, Any] | None = None
) -> dict[str, Any]:
    event = {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": round(float(start), 3),
             "dur": round(float(dur), 3)}
    return event | {"args": args} if args else event
