"""Layers that a trace lacks keep the default layout: priced in time, written by exporters, said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from loadmaster.errors import InputError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.comparison.compare import compare
from loadmaster.placement.cost.evaluate import evaluate
from loadmaster.placement.cost.unplanned import completed, default_slots_GC
from loadmaster.placement.formats import export_plan
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.planner import plan
from loadmaster.placement.rebalancing.rebalance import rebalance
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.synth.generate import synth_trace
from loadmaster.traces.trace import RoutingTrace

STEPS = StepSampler(tokens=128, concurrency=8)
CLUSTER = Cluster.preset("h100", devices_per_node=4, slots_per_device=3)
MODEL = ModelSpec(
    name="six", num_layers=6, num_experts=8, top_k=2, hidden=256, intermediate=128,
    layer_indices=(2, 3, 4, 5, 6, 7), total_layers=8,
)


def trace_of(layers: tuple[int, ...], seed: int = 0) -> RoutingTrace:
    """Layers 3, 4 and 6 of the model, or others, all routed alike."""
    made = synth_trace(layers=1, experts=8, top_k=2, tokens=6000, request_tokens=50, seed=seed)
    return RoutingTrace.from_arrays(
        np.repeat(made.ids, len(layers), axis=1), num_experts=8, request=made.request_T(),
        layer_indices=layers,
    )


def default_plan(layers: int, slots: int) -> Plan:
    return Plan(np.tile(default_slots_GC(8, 4, slots), (layers, 1, 1)), num_experts=8)


def test_the_default_layout_is_that_of_engines() -> None:
    """Expert s mod E in slot s."""
    assert default_slots_GC(6, 2, 4).tolist() == [[0, 1, 2, 3], [4, 5, 0, 1]]


def test_missing_layers_cost_what_the_recorded_cost_under_the_default_layout() -> None:
    """Where all layers route alike and stand in the default layout, some tell the time of all."""
    some, whole = trace_of((3, 4, 6)), trace_of(MODEL.layer_indices or ())
    told = evaluate(default_plan(3, 2), some, CLUSTER, steps=STEPS, model=_numbered(some))
    every = evaluate(default_plan(6, 2), whole, CLUSTER, steps=STEPS, model=MODEL)
    assert every.step_time_us is not None and told.step_time_us is not None
    part = evaluate(_as(default_plan(3, 2), (3, 4, 6)), some, CLUSTER, steps=STEPS, model=MODEL)
    assert part.step_time_us == pytest.approx(every.step_time_us)
    assert part.step_time_us == pytest.approx(2 * told.step_time_us)
    assert any("that the plan does not hold" in note for note in part.notes)
    assert part.layer_time_us is not None and len(part.layer_time_us) == 3


def test_a_better_plan_gains_on_its_own_layers_alone() -> None:
    """The layers that were not recorded cost the same under every plan with as many slots."""
    some = trace_of((3, 4, 6))
    made = plan(some, CLUSTER, method="greedy", steps=STEPS, model=MODEL).plan
    other = _as(default_plan(3, 3), (3, 4, 6))
    table = compare({"now": other, "new": made}, some, CLUSTER, steps=STEPS, model=MODEL)
    alone = compare(
        {"now": other, "new": _without_model(made)}, some, CLUSTER, steps=STEPS,
        model=_numbered(some),
    )
    def gain(found: Any) -> float:
        times = [found.evaluations[name].step_time_us for name in ("now", "new")]
        return float(times[0] - times[1])

    assert gain(table) == pytest.approx(gain(alone))


def test_plan_says_and_prices_what_the_trace_lacks() -> None:
    some = trace_of((3, 4, 6))
    made = plan(some, CLUSTER, method="greedy", steps=STEPS, model=MODEL)
    assert made.plan.layer_indices == (3, 4, 6)
    said = " ".join(made.evidence.notes)
    assert "lacks 3 of the model's 6 MoE layers (2,5,7): they keep the engines' default" in said
    judged = evaluate(made.plan, some, CLUSTER, steps=STEPS, model=MODEL)
    assert judged.step_time_us == pytest.approx(made.evidence.objective, rel=0.05)
    assert made.evidence.bound <= judged.step_time_us
    moved = rebalance(made.plan, some, CLUSTER, steps=STEPS, model=MODEL, max_moves=2)
    assert "lacks 3 of the model's 6" in " ".join(moved.evidence.notes)


def test_the_bound_holds_for_plans_with_fewer_replicas_too() -> None:
    """Unplanned layers hold as many slots as the plan fills: the bound counts the fewest."""
    some = trace_of((3,))
    full = plan(some, CLUSTER, method="greedy", steps=STEPS, model=MODEL)
    bare = plan(some, CLUSTER, method="contiguous", steps=STEPS, model=MODEL)
    assert full.evidence.bound == pytest.approx(bare.evidence.bound)
    assert bare.evidence.bound <= bare.evidence.objective


def test_average_loads_of_some_layers_are_planned_and_said() -> None:
    profile = Profile.from_loads(np.arange(1, 17).reshape(2, 8), layer_indices=(2, 7))
    made = plan(profile, CLUSTER, method="greedy", model=MODEL, objective="balance")
    assert made.plan.layer_indices == (2, 7)
    assert "lacks 4 of the model's 6 MoE layers (3-6)" in " ".join(made.evidence.notes)


def test_a_trace_of_other_layers_or_experts_is_refused() -> None:
    with pytest.raises(InputError, match="the trace's layers 0-2 are not MoE layers of six, 2-7"):
        plan(trace_of((0, 1, 2)), CLUSTER, model=MODEL, steps=STEPS)
    other = MODEL.model_copy(update={"num_experts": 16})
    with pytest.raises(InputError, match="do not belong together"):
        plan(trace_of((3, 4)), CLUSTER, model=other, steps=STEPS)


# ---- exported whole ---------------------------------------------------------------------------

HELD = np.array([[[7, 6, 5, 4, 3, 2], [1, 0, 7, 6, 5, 4]]], np.int16)
PART = Plan(HELD, num_experts=8, layer_indices=(4,))
DEFAULT = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
OWN = HELD.reshape(-1).tolist()


def test_a_plan_is_completed_with_the_default_layout() -> None:
    whole = completed(PART, MODEL)
    assert whole.layer_indices == (2, 3, 4, 5, 6, 7) and whole.evidence is None
    rows = [layer.reshape(-1).tolist() for layer in whole.slots]
    assert rows == [DEFAULT, DEFAULT, OWN, DEFAULT, DEFAULT, DEFAULT]
    assert completed(whole, MODEL) is whole


def test_exporters_write_every_layer_of_the_model(tmp_path: Path) -> None:
    notes = export_plan(PART, "sglang", tmp_path / "s.json", model=MODEL)
    table = json.loads((tmp_path / "s.json").read_text())["physical_to_logical_map"]
    assert table == [DEFAULT] * 4 + [OWN] + [DEFAULT] * 3
    assert "holds 1 of the model's 6 MoE layers; 2-3,5-7 get the engines' default" in notes[0]
    export_plan(PART, "trtllm", tmp_path / "t.yaml", model=MODEL)
    assert yaml.safe_load((tmp_path / "t.yaml").read_text())["initial_global_assignments"] == {
        layer: OWN if layer == 4 else DEFAULT for layer in range(2, 8)
    }
    export_plan(PART, "vllm", tmp_path / "v.json", model=MODEL)
    assert json.loads((tmp_path / "v.json").read_text()) == (
        [DEFAULT] * 2 + [OWN] + [DEFAULT] * 3
    )
    export_plan(PART, "vllm_ascend", tmp_path / "a.json", model=MODEL)
    layers = json.loads((tmp_path / "a.json").read_text())["layer_list"]
    assert [layer["layer_id"] for layer in layers] == list(range(6))
    export_plan(PART, "omni", tmp_path / "o.npy", model=MODEL)
    assert np.load(tmp_path / "o.npy").shape == (2, 6, 8)


def _numbered(trace: RoutingTrace) -> ModelSpec:
    """A model of the recorded layers alone."""
    return MODEL.model_copy(
        update={"num_layers": trace.num_layers, "layer_indices": trace.layer_indices}
    )


def _as(made: Plan, layers: tuple[int, ...]) -> Plan:
    return Plan(made.slots, num_experts=8, layer_indices=layers)


def _without_model(made: Plan) -> Plan:
    return Plan(made.slots, made.num_experts, layer_indices=made.layer_indices)
