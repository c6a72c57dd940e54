"""Whether a plan is judged under the rule that the engine runs: a section of the field's benchmark.

engine_rules   every choice of the engines' own functions (`tests/placement/dispatch/
               engine_choices.json`) against ours; then real routing, 8 devices, 25 % spare slots
               and EPLB's plan, default steps: imbalance under each rule beside what the engine's
               choice makes of the same steps (`oracles/engine_choices.py`), and how many choices
               differ. SGLang draws `sglang_dynamic` on the device: its imbalance must agree
               within the spread of ten draws.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from oracles import engine_choices as engines
from placement_quality import DATA, routing

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.evaluate import evaluate, imbalance_of
from loadmaster.placement.dispatch.assignment import layer_dispatch, layers_draws
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.placement.planning.planner import plan
from loadmaster.traces.steps import Steps, StepSampler
from loadmaster.traces.trace import RoutingTrace

RECORDED = Path(__file__).resolve().parents[1] / "tests/placement/dispatch/engine_choices.json"
TRACES = {"gpt-oss": "gptoss20b_decode", "ESFT": "esft_law_translation"}
RANKS, MOST_STEPS, DRAWS = 8, 16, 10
Array = npt.NDArray[Any]


def engine_rules() -> dict[str, Any]:
    """The section's figures."""
    vectors = recorded()
    real = {
        f"{name}, {nodes} node{'s' if nodes > 1 else ''}": on_routing(routing(file), nodes)
        for name, file in TRACES.items() if (DATA / f"{file}.npz").exists()
        for nodes in (1, 2)
    }
    differing = sum(found["differing"] for found in vectors.values())
    rows = [row for found in real.values() for row in found.values() if "agrees" in row]
    holds = differing == 0 and all(row["agrees"] for row in rows)
    skipped = {} if len(real) == 2 * len(TRACES) else {
        "skipped": "real data not present: ../shared/data"
    }
    return {
        "holds": holds and not skipped, "target": "0 differing choices in the engines' own vectors",
        "differing": differing, "vectors": vectors, "imbalance": real, **skipped,
    }


def recorded() -> dict[str, dict[str, Any]]:
    """By policy: replicated choices in the vectors, and those that differ from ours."""
    found = {}
    for policy, vectors in json.loads(RECORDED.read_text()).items():
        chosen = [_of_vector(policy, case) for case in vectors["cases"]]
        ours = np.concatenate([a.reshape(-1) for a, _, _ in chosen])
        theirs = np.concatenate([b.reshape(-1) for _, b, _ in chosen])
        replicated = np.concatenate([c.reshape(-1) for _, _, c in chosen])
        found[policy] = {
            "engine": vectors["engine"], "function": vectors["function"], "choices": len(ours),
            "replicated": int(replicated.sum()), "differing": int((ours != theirs).sum()),
        }
    return found


def _of_vector(policy: str, case: dict[str, Any]) -> tuple[Array, Array, Array]:
    """(our choices, the engine's, whether the expert has replicas)."""
    experts, tables = case["experts"], "ids" not in case
    slots_LS = np.array(case["slots"]).reshape(-1, np.array(case["slots"]).shape[-1])
    ranks = case.get("ranks", 1)
    slots_LGC = slots_LS.reshape(len(slots_LS), ranks, -1)
    cluster = Cluster.preset(
        "h100", nodes=case.get("nodes", 1), devices_per_node=ranks // case.get("nodes", 1),
        slots_per_device=slots_LGC.shape[2],
    )
    parameters = {k: case[k] for k in ("tensor_parallel",) if k in case}
    spec = DispatchSpec(policy=policy, parameters=parameters)
    if tables:
        ids = np.tile(np.arange(experts)[:, None], (ranks, 1)).astype(np.int32)
        home = np.repeat(np.arange(ranks), experts).astype(np.int32)
    else:
        ids = np.array(case["ids"], np.int32)
        home = np.zeros(len(ids), np.int32)
    ours = np.stack(list(_chosen(slots_LGC, experts, cluster, spec, [ids] * len(slots_LS), home)))
    many = np.stack([np.bincount(row, minlength=experts)[ids] > 1 for row in slots_LS])
    return ours, np.array(case["chosen"]).reshape(ours.shape), many


def _chosen(
    slots_LGC: Array, experts: int, cluster: Cluster, spec: DispatchSpec, ids: list[Array],
    home_T: Array,
) -> Any:
    """Our slots of one step, layer by layer."""
    draws_L = layers_draws(slots_LGC, experts, cluster, spec)
    for slots_GC, draws, ids_TK in zip(slots_LGC, draws_L, ids, strict=True):
        layer = layer_dispatch(slots_GC, experts, cluster, spec, draws)
        counted = layer.count(np.ascontiguousarray(ids_TK, np.int32), home_T)
        yield layer.place(counted, layer.split(counted.counts_GX))


def on_routing(trace: RoutingTrace, nodes: int) -> dict[str, dict[str, Any]]:
    """By policy: imbalance as we predict it and as the engine's choices make it."""
    slots = round(trace.num_experts * 1.25 / RANKS)
    cluster = Cluster.preset(
        "h100", nodes=nodes, devices_per_node=RANKS // nodes, slots_per_device=slots
    )
    made = plan(trace, cluster, method="eplb", objective="balance").plan
    made = Plan(slots=made.slots, num_experts=made.num_experts)      # layers 0, 1, 2...
    steps = StepSampler().sample(trace, MOST_STEPS)
    even = evaluate(made, trace, cluster, steps=steps, dispatch="even").imbalance_mean
    found: dict[str, dict[str, Any]] = {"even": {"predicted": round(even, 4)}}
    for policy in ("vllm_hash", "sglang_static", "sglang_rows", "trtllm_round_robin",
                   "ascend_fixed", "sglang_dynamic"):
        judged = evaluate(made, trace, cluster, steps=steps, dispatch=policy)
        found[policy] = {"predicted": round(judged.imbalance_mean, 4)} | (
            _drawn(trace, steps, made, cluster, judged.imbalance_mean)
            if policy == "sglang_dynamic"
            else _decided(policy, trace, steps, made, cluster, judged.imbalance_mean)
        )
    return found


def _decided(
    policy: str, trace: RoutingTrace, steps: Steps, made: Plan, cluster: Cluster, predicted: float
) -> dict[str, Any]:
    layouts = made.slots.reshape(made.num_layers, -1)
    tables = {
        "sglang_static": lambda: engines.sglang_tables(layouts.tolist(), RANKS, cluster.num_nodes),
        "ascend_fixed": lambda: engines.ascend_tables(layouts.tolist(), RANKS),
    }.get(policy, lambda: None)()
    home_A, spec = trace.home_rank_T(RANKS)[steps.token], DispatchSpec(policy=policy)
    differing = replicated = 0
    tokens_WLG = np.zeros((len(steps), made.num_layers, RANKS))
    for w in range(len(steps)):
        part = slice(steps.offset[w], steps.offset[w + 1])
        token, home_T = steps.token[part], home_A[part].astype(np.int32)
        ids = [trace.ids[token, layer].astype(np.int64) for layer in range(made.num_layers)]
        ours = _chosen(made.slots, made.num_experts, cluster, spec, ids, home_T)
        for layer, slot_TK in enumerate(ours):
            layout = layouts[layer].tolist()
            if tables is None:
                engine_TK = getattr(engines, policy)(ids[layer], home_T, layout)
            else:
                engine_TK = tables[layer][home_T[:, None], ids[layer]]
            many_TK = np.bincount(layout, minlength=made.num_experts)[ids[layer]] > 1
            replicated += int(many_TK.sum())
            differing += int((engine_TK != slot_TK).sum())
            tokens_WLG[w, layer] = _tokens(engine_TK, made)
    engine = float(np.nanmean(imbalance_of(tokens_WLG, cluster)))
    return {
        "engine": round(engine, 4), "replicated": replicated, "differing": differing,
        "agrees": differing == 0 and abs(engine - predicted) < 1e-9,
    }


def _drawn(
    trace: RoutingTrace, steps: Steps, made: Plan, cluster: Cluster, predicted: float
) -> dict[str, Any]:
    """Ten draws of SGLang's kind; ours is one more."""
    rng, layouts = np.random.default_rng(0), made.slots.reshape(made.num_layers, -1)
    means = []
    for _ in range(DRAWS):
        tokens_WLG = np.zeros((len(steps), made.num_layers, RANKS))
        for w in range(len(steps)):
            token = steps.token[steps.offset[w]:steps.offset[w + 1]]
            for layer in range(made.num_layers):
                slot_TK = engines.sglang_random(
                    trace.ids[token, layer].astype(np.int64), layouts[layer].tolist(), rng
                )
                tokens_WLG[w, layer] = _tokens(slot_TK, made)
        means.append(float(np.nanmean(imbalance_of(tokens_WLG, cluster))))
    low, high = min(means), max(means)
    spread = high - low
    return {
        "engine": round(float(np.mean(means)), 4), "draws": [round(low, 4), round(high, 4)],
        "agrees": low - spread <= predicted <= high + spread,
    }


def _tokens(slot_TK: Array, made: Plan) -> Array:
    return np.bincount(slot_TK.reshape(-1) // made.slots_per_device, minlength=RANKS)
