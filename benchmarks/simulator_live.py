"""`live`: predictions against live ranks, on plans that the fit has not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from oracles.live_agreement import agreement, fit_rank_time, predict_critical_us

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.step_loads import step_loads
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.placement.planning.planner import plan as make_plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import RECORDED
from loadmaster.traces.trace import RoutingTrace
from loadmaster.workers.demo.traffic import mixed
from loadmaster.workers.group.group import Group
from loadmaster.workers.reference import reference_model_dir

RANKS, STEP_TOKENS, STEPS, ROUNDS = 4, 4096, 12, 4
FITTED = "contiguous"


def live() -> dict[str, Any]:
    """Fit under `contiguous`, predict six other plans from its trace, serve under each in turn.

    The turns follow each other round after round, so that a machine that gets slower or faster
    meanwhile biases no plan.
    """
    sent = mixed(STEP_TOKENS * STEPS, seed=0)
    with Group.start(reference_model_dir(), ranks=RANKS, name="simulator-benchmark") as group:
        warm = mixed(STEP_TOKENS, seed=1).prompts
        group.prefill(warm, step_tokens=STEP_TOKENS)
        model = group.model_spec
        group.record(True)
        group.prefill(mixed(STEP_TOKENS * 8, seed=2).prompts, step_tokens=STEP_TOKENS)
        group.record(False)
        plans = {FITTED: group.plan} | _unseen(group.trace(take=True), model)
        served: dict[str, list[Any]] = {name: [] for name in plans}
        traces: list[RoutingTrace] = []
        for number, part in enumerate(sent.parts(ROUNDS)):
            names = list(plans)
            for name in names[number:] + names[:number]:
                if group.plan.slots.tobytes() != plans[name].slots.tobytes():
                    group.apply(plans[name])
                    group.prefill(warm, step_tokens=STEP_TOKENS)    # new weights are cold
                group.record(name == FITTED)
                first = group.step
                group.prefill(part.prompts, part.domains, step_tokens=STEP_TOKENS)
                served[name].append(group.measurements(first))
                if name == FITTED:
                    group.record(False)
                    traces.append(group.trace(take=True))
    return _judged(plans, traces, served, model)


def _judged(
    plans: dict[str, Plan], traces: list[RoutingTrace], served: dict[str, Any], model: ModelSpec
) -> dict[str, Any]:
    cluster = _cluster(max(p.slots_per_device for p in plans.values()))
    counted = [
        step_loads(trace, RECORDED.sample(trace), plans[FITTED], cluster) for trace in traces
    ]
    fit = fit_rank_time(
        np.concatenate([m.expert_cpu_us for m in served[FITTED]]),
        np.concatenate([c.active_WLG for c in counted]),
        np.concatenate([c.tokens_WLG for c in counted]),
    )
    unseen = {name: plan for name, plan in plans.items() if name != FITTED}
    parts = [
        predict_critical_us(unseen, trace, RECORDED.sample(trace), cluster, model, fit)
        for trace in traces
    ]
    predicted = {name: np.concatenate([p[name] for p in parts]) for name in unseen}
    measured = {name: np.concatenate([m.critical_us for m in served[name]]) for name in unseen}
    found = agreement(predicted, measured)
    return {
        "holds": bool(
            found.median_error <= 0.10 and not found.misordered and found.pairs > 0
            and len(unseen) >= 6
        ),
        **found.to_dict(),
        "fit": {"start_us": fit.start_us, "active_us": fit.active_us, "token_us": fit.token_us,
                "residual_spread": float(np.log(fit.residual_MG).std()),
                "error": vars(fit.error)},
        "steps_per_plan": {name: len(us) for name, us in measured.items()},
        "measured_ms": {name: float(us.mean() / 1e3) for name, us in measured.items()},
        "predicted_ms": {name: float(us.mean() / 1e3) for name, us in predicted.items()},
    }


def _unseen(trace: RoutingTrace, model: ModelSpec) -> dict[str, Plan]:
    """Six plans from good to bad, with and without replicas."""
    tight, roomy = (_cluster(s) for s in (model.num_experts // RANKS, model.num_experts // 3))
    plans = {
        "round_robin": make_plan(trace, tight, method="round_robin").plan,
        "greedy": make_plan(trace, tight, method="greedy").plan,
        "eplb_replicas": make_plan(trace, roomy, method="eplb").plan,
        "auto_replicas": make_plan(trace, roomy, method="auto").plan,
        "hot_together": _hot_together(trace, RANKS),
        "shuffled": _shuffled(model, RANKS),
    }
    return plans


def _hot_together(trace: RoutingTrace, ranks: int) -> Plan:
    """The worst placement: the most loaded experts all on the first rank."""
    order = np.argsort(-trace.load_LE(), axis=1, kind="stable")
    slots = order.reshape(trace.num_layers, ranks, -1).astype(np.int16)
    return Plan(slots, trace.num_experts, dispatch=DispatchSpec())


def _shuffled(model: ModelSpec, ranks: int) -> Plan:
    rng = np.random.default_rng(5)
    rows = [rng.permutation(model.num_experts).reshape(ranks, -1) for _ in range(model.num_layers)]
    return Plan(np.stack(rows).astype(np.int16), model.num_experts, dispatch=DispatchSpec())


def _cluster(slots: int) -> Cluster:
    return Cluster.preset("cpu", devices_per_node=RANKS, slots_per_device=slots)
