"""The whole loop on one machine: serve, record, plan, simulate, apply, serve on, measure.

Runs the reference model on local ranks. Returns figures and leaves a run folder; prints nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import UsageError
from ...foundation.output_folder import new_run_folder, remove_if_empty
from ...placement.cluster import Cluster
from ...placement.comparison.compare import Comparison, compare
from ...placement.plan import Plan
from ...placement.planning.planner import PlanResult, plan
from ...simulator.serving.result import SimulationResult
from ...simulator.serving.simulate import Serving, simulate
from ...simulator.serving.workload import Workload
from ...traces.model_spec import ModelSpec
from ...traces.steps import RECORDED, StepSampler
from ...traces.trace import RoutingTrace
from ..calibrate.expert_fit import ExpertFit, fit_kernel, machine, scale_to_live
from ..coordinator.step_log import Measurements
from ..group.group import Group
from ..protocol.plan_switch import ApplyReport
from ..reference import reference_model_dir
from . import traffic
from .measure import (
    Figures,
    Gain,
    Overhead,
    measured,
    measured_gain,
    predicted,
    recording_overhead,
)
from .pinning import pin_in_turn
from .report import leave
from .result import DemoResult, DemoSize, ServedTurn

STEP_TOKENS = 4096
OVERHEAD_STEPS = 3

Progress = Callable[[str, int, int], None]
_USUAL = DemoSize()


def run_demo(
    *,
    ranks: int = 4,
    out: Path | None = None,
    seed: int = 0,
    size: DemoSize = _USUAL,
    progress: Progress | None = None,
) -> DemoResult:
    """Serve the reference model under contiguous, plan, simulate, apply, serve on under both plans
    in turn, so that what else this machine does biases neither.

    Raises UsageError when the run folder exists or the ranks cannot share the experts.
    """
    say = progress or (lambda text, done, total: None)
    if ranks < 2:
        raise UsageError(f"ranks {ranks}: placement needs at least 2")
    folder = new_run_folder(out, "demo")
    try:
        return _in_folder(folder, ranks, seed, size, say)
    finally:
        remove_if_empty(folder)      # interrupted, or failed


def _in_folder(
    folder: Path, ranks: int, seed: int, size: DemoSize, say: Progress
) -> DemoResult:
    started = time.perf_counter()
    planning = traffic.mixed(size.plan_steps * STEP_TOKENS, seed)
    judging = traffic.mixed_then_shifting(size.judge_steps * STEP_TOKENS, seed + 1000)
    decoding = traffic.mixed(size.decode_prompts * traffic.PROMPT_TOKENS, seed + 2000)
    say("starting Ray and the ranks", 0, 7)
    with Group.start(reference_model_dir(), ranks=ranks, name=f"demo-{os.getpid()}") as group:
        if ranks > (os.cpu_count() or 1):
            pin_in_turn(group.status()["pids"])     # before and after differ by the plan alone
        say("warming up", 1, 7)
        group.prefill(planning.head(8 * ranks).prompts)
        say("serving and recording the traffic to plan from", 2, 7)
        recorded = _record(group, planning)
        say("serving unseen traffic under contiguous", 3, 7)
        before = _serve(group, judging, decoding, size.decode_tokens, record=True)
        assert before.trace is not None and before.decode_trace is not None
        say("planning, and proving the plan in simulation", 4, 7)
        model, current_plan = group.model_spec, group.plan
        cluster = _cluster(model, ranks)
        kernel = fit_kernel(model)
        fit, cluster = _timed(kernel, before.steps, before.trace, current_plan, cluster, model)
        made = _plan(recorded, model, cluster, seed)
        plans = {"contiguous": current_plan, "auto": made.plan}
        comparison = compare(plans, before.trace, cluster, steps=RECORDED, model=model)
        decode = _decode_view(plans, before, kernel, cluster, model)
        simulated = _simulate(plans, before.trace, cluster, model, seed)
        say("switching plans and serving the same traffic under both", 5, 7)
        turns, report = _in_turns(group, plans, judging, decoding, size)
        say("measuring what recording costs", 6, 7)
        overhead = _overhead(group, judging, size.overhead_pairs)
    old, new = turns["contiguous"], turns["auto"]
    gain = measured_gain(old.steps, new.steps)
    result = DemoResult(
        verdict=_verdict(measured(old.steps), measured(new.steps), gain, comparison),
        before=measured(old.steps),
        predicted=predicted(made.plan, before.trace, cluster, model, None),
        measured=measured(new.steps),
        gain=gain,
        decode_verdict=decode_verdict(
            decode.table, measured_gain(old.decode_steps, new.decode_steps)
        ),
        decode_before=measured(old.decode_steps), decode_predicted=decode.figures,
        decode_measured=measured(new.decode_steps),
        outputs_identical=before.outputs == old.outputs == new.outputs,
        applied=report, overhead=overhead, fit=fit, planned=made, comparison=comparison,
        simulated=simulated, ranks=ranks, cores=os.cpu_count() or 1,
        seconds=time.perf_counter() - started, folder=folder,
    )
    leave(result, folder, recorded, before.trace, plans, cluster)
    return result


def _record(group: Group, sent: traffic.DemoTraffic) -> RoutingTrace:
    group.record(True)
    group.prefill(sent.prompts, sent.domains, step_tokens=STEP_TOKENS)
    group.record(False)
    return group.trace(take=True)


def _serve(
    group: Group, judging: traffic.DemoTraffic, decoding: traffic.DemoTraffic, new_tokens: int, *,
    record: bool,
) -> ServedTurn:
    """Prefill the one, then decode the other; the steps of each apart."""
    group.record(record)
    first = group.step
    prefill = group.prefill(judging.prompts, judging.domains, step_tokens=STEP_TOKENS)
    steps = group.measurements(first)
    trace = group.trace(take=True) if record else None
    middle = group.step
    generated = group.generate(decoding.prompts, new_tokens, decoding.domains)
    decode_steps = _only_decode(group.measurements(middle), len(decoding.prompts))
    group.record(False)
    decode_trace = None
    if record:
        recorded = group.trace(take=True)
        assert recorded.step is not None
        decode_trace = recorded.select(np.isin(recorded.step, decode_steps.step))
    return ServedTurn((prefill.digests, generated), steps, decode_steps, trace, decode_trace)


def _in_turns(
    group: Group, plans: dict[str, Plan], judging: traffic.DemoTraffic,
    decoding: traffic.DemoTraffic, size: DemoSize,
) -> tuple[dict[str, ServedTurn], ApplyReport]:
    """Every stretch of the traffic under both plans, the first turn alternating; auto stays.

    The report is the first switch's."""
    served: dict[str, list[ServedTurn]] = {"contiguous": [], "auto": []}
    active, reports = "contiguous", []
    for number, stretch in enumerate(judging.parts(size.rounds)):
        for name in ("contiguous", "auto") if number % 2 else ("auto", "contiguous"):
            if name != active:
                reports.append(group.apply(plans[name]))
                active = name
            served[name].append(_serve(group, stretch, decoding, size.decode_tokens, record=False))
    if active != "auto":
        group.apply(plans["auto"])
    return {name: _joined(turns) for name, turns in served.items()}, reports[0]


def _joined(turns: list[ServedTurn]) -> ServedTurn:
    """All turns as one. What is generated is the same every time, or the demo notes it."""
    digests = tuple(d for turn in turns for d in turn.outputs[0])  # type: ignore[attr-defined]
    generated = [turn.outputs[1] for turn in turns]
    same = all(g == generated[0] for g in generated)
    return ServedTurn(
        (digests, generated[0] if same else None),
        Measurements.joined([t.steps for t in turns]),
        Measurements.joined([t.decode_steps for t in turns]),
    )


def _only_decode(steps: Measurements, prompts: int) -> Measurements:
    """Steps that held one row of every request."""
    return steps.take(np.flatnonzero(steps.rows.sum(axis=1) == prompts))


def _cluster(model: ModelSpec, ranks: int) -> Cluster:
    """A quarter more slots than experts; the planner may leave them empty."""
    share = -(-model.num_experts // ranks)
    slots = share + max(1, round(share / 4))
    return Cluster.preset("cpu", devices_per_node=ranks, slots_per_device=slots)


def _timed(
    kernel: ExpertFit, steps: Measurements, trace: RoutingTrace, plan: Plan, cluster: Cluster,
    model: ModelSpec,
) -> tuple[ExpertFit, Cluster]:
    """Expert times as these steps showed them, and the cluster with them."""
    fit = scale_to_live(kernel, steps, trace, plan, cluster, model)
    return fit, cluster.model_copy(update={"hardware": machine(fit, cluster.hardware)})


def _plan(recorded: RoutingTrace, model: ModelSpec, cluster: Cluster, seed: int) -> PlanResult:
    """auto for the least time of steps as they were served."""
    return plan(
        recorded, cluster, method="auto", objective="time", dispatch="balanced", model=model,
        effort="fast", seed=seed,
        steps=StepSampler(tokens=STEP_TOKENS, concurrency=STEP_TOKENS // traffic.PROMPT_TOKENS),
    )


@dataclass(frozen=True)
class _DecodeView:
    table: Comparison
    figures: Figures


def _decode_view(
    plans: dict[str, Plan], before: ServedTurn, kernel: ExpertFit, cluster: Cluster,
    model: ModelSpec,
) -> _DecodeView:
    """What the plan is worth at decode, judged by time: waking more experts costs."""
    assert before.decode_trace is not None
    _, cluster = _timed(
        kernel, before.decode_steps, before.decode_trace, plans["contiguous"], cluster, model
    )
    return _DecodeView(
        compare(plans, before.decode_trace, cluster, steps=RECORDED, model=model),
        predicted(plans["auto"], before.decode_trace, cluster, model, None),
    )


def decode_verdict(table: Comparison, gain: Gain) -> str:
    """A gain counts where other requests would show it, and where serving it live shows more than
    noise: steps that take milliseconds scatter more than a placement changes them."""
    row = table.row("auto")
    text = (
        f"the slowest ranks' expert time changed by {-gain.share:+.1%} ± {gain.band:.1%} as "
        "measured"
    )
    if not row.better:
        return f"leave it at decode: {table.verdict}; {text}"
    if -row.change_percent / 100 <= gain.band:
        return (
            f"leave it at decode: step time by {row.change_percent:+.1f} % as predicted is within "
            f"the noise; {text}"
        )
    return f"{table.verdict}; {text}"


def _simulate(
    plans: dict[str, Plan], trace: RoutingTrace, cluster: Cluster, model: ModelSpec, seed: int
) -> dict[str, SimulationResult]:
    """The same requests under both plans, at 70 % of what the contiguous plan sustains."""
    requests = 400
    capacity = predicted(plans["contiguous"], trace, cluster, model, None)
    gap_us = capacity.critical_path_us / STEP_TOKENS * traffic.PROMPT_TOKENS / 0.7
    arrival_us = np.cumsum(np.random.default_rng(seed).exponential(gap_us, requests))
    workload = Workload.from_arrays(
        arrival_us, np.full(requests, traffic.PROMPT_TOKENS), np.full(requests, 1)
    )
    return {
        name: simulate(p, workload, cluster, trace=trace, model=model, serving=Serving(), seed=seed)
        for name, p in plans.items()
    }


def _overhead(group: Group, sent: traffic.DemoTraffic, pairs: int) -> Overhead:
    """Blocks of the same prompts, recording on and off in turn."""
    on: list[Measurements] = []
    off: list[Measurements] = []
    block = sent.head(OVERHEAD_STEPS * STEP_TOKENS // traffic.PROMPT_TOKENS)
    for pair in range(pairs):
        for recording in ((True, False) if pair % 2 else (False, True)):
            group.record(recording)
            first = group.step
            group.prefill(block.prompts, step_tokens=STEP_TOKENS)
            (on if recording else off).append(group.measurements(first))
    group.record(False)
    return recording_overhead(on, off)


def _verdict(before: Figures, after: Figures, gain: Gain, comparison: Comparison) -> str:
    row = comparison.row("auto")
    text = (
        f"imbalance {before.imbalance_mean:.3f} -> {after.imbalance_mean:.3f}; the slowest ranks' "
        f"expert time changed by {-gain.share:+.1%} ± {gain.band:.1%} as measured, step time by "
        f"{row.change_percent:+.1f} % as predicted"
    )
    return f"apply auto: {text}" if row.change_high_percent < 0 else f"leave it: {text}"
