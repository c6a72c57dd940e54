"""Changing plans under load: who pauses, for how long, and when it has paid off."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from loadmaster.errors import InfeasibleError, UsageError
from loadmaster.placement.cost.step_cost import move_cost
from loadmaster.placement.plan import Plan
from loadmaster.simulator.events.plan_switch import PlanSwitch
from loadmaster.simulator.pricing.memory import MemorySpec
from loadmaster.simulator.serving.batching import BatchLimits
from loadmaster.simulator.serving.simulate import Serving, simulate

from ..conftest import EXPERTS, LAYERS, contiguous_plan, steady_workload

SERVING = Serving(BatchLimits(step_tokens=128, max_requests=32))


def reversed_plan(plan: Plan) -> Plan:
    """Every device's experts on the opposite device."""
    return Plan(plan.slots[:, ::-1], EXPERTS, dispatch=plan.dispatch)


def run(plan, cluster, trace, model, *interventions, load=None):
    return simulate(
        plan, load or steady_workload(), cluster, trace=trace, model=model,
        interventions=interventions, routing="every_step", serving=SERVING,
    )


def test_a_stopped_switch_pauses_for_the_moves_and_no_longer(cluster, trace, model) -> None:
    plan = contiguous_plan()
    target = reversed_plan(plan)
    result = run(plan, cluster, trace, model, PlanSwitch(target, at_us=2e3))
    cost = move_cost(plan.moves_to(target), plan, model, cluster)
    assert [e.kind for e in result.events] == ["switch"]
    assert result.paused_us == pytest.approx(cost.us, rel=1e-3)
    assert set(result.steps.epoch.tolist()) == {0, 1}


def test_layer_by_layer_lets_a_step_run_after_each_layer(cluster, trace, model) -> None:
    plan = contiguous_plan()
    result = run(plan, cluster, trace, model, PlanSwitch(reversed_plan(plan), 2e3, "layers"))
    switches = [e for e in result.events if e.kind == "switch"]
    assert [e.detail.split(":")[0] for e in switches] == [
        "layer 0", "layer 1", "layer 2", "last layer in place"
    ]
    at = [e.at_us * 1e3 for e in switches]
    for before, after in itertools.pairwise(at):
        between = (result.steps.start_ns >= before) & (result.steps.start_ns < after)
        assert between.sum() == 1
    longest = max(e.pause_us for e in switches)
    whole = run(plan, cluster, trace, model, PlanSwitch(reversed_plan(plan), 2e3))
    assert longest < whole.paused_us / 2


def test_a_hidden_switch_pauses_nothing_but_takes_longer(cluster, trace, model) -> None:
    plan = contiguous_plan()
    load = steady_workload(requests=200)
    hidden = run(plan, cluster, trace, model, PlanSwitch(reversed_plan(plan), 2e3, "hidden"),
                 load=load)
    cost = move_cost(plan.moves_to(reversed_plan(plan)), plan, model, cluster)
    assert hidden.paused_us == 0.0
    staged, commit = hidden.events
    assert (staged.kind, commit.kind) == ("staging", "switch")
    assert commit.at_us - staged.at_us > cost.us / 0.8, "exchanges go first on the links"


def test_an_unchanged_plan_moves_nothing(cluster, trace, model) -> None:
    result = run(contiguous_plan(), cluster, trace, model, PlanSwitch(contiguous_plan(), 1e3))
    assert result.paused_us == 0.0
    assert "0 experts, 0 bytes" in result.events[0].detail


def test_a_switch_to_a_better_plan_shortens_steps_from_then_on(cluster, trace, model) -> None:
    """Front-domain requests under a plan that piles their experts up, then one that does not."""
    front = trace.slice_domains(["front"])
    piled = contiguous_plan()
    spread = Plan(
        np.tile(np.array([[0, 7], [1, 6], [2, 5], [3, 4]], np.int16), (3, 1, 1)), EXPERTS
    )
    fat = model.model_copy(update={"hidden": 8192, "intermediate": 8192})
    load = steady_workload(requests=100)
    result = run(piled, cluster, front, fat, PlanSwitch(spread, 3e4), load=load)
    took, epoch = result.steps.duration_ns, result.steps.epoch
    full = result.steps.prefill_tokens + result.steps.decode_tokens > 40
    assert took[full & (epoch == 1)].mean() < took[full & (epoch == 0)].mean()


def test_an_unknown_way_is_refused(cluster, trace, model) -> None:
    with pytest.raises(UsageError, match=r"PlanSwitch\.mode 'slowly'"):
        run(contiguous_plan(), cluster, trace, model,
            PlanSwitch(contiguous_plan(), 0.0, "slowly"))  # type: ignore[arg-type]


def with_room(cluster, model, slots: int, tokens: int):
    """Devices whose memory holds so many slots of experts and KV tokens of 1,000 bytes."""
    room = LAYERS * slots * int(model.bytes_per_expert_E()[0]) + tokens * 1000
    hardware = cluster.hardware.model_copy(update={"memory_bytes": room})
    return cluster.with_slots(4).model_copy(update={"hardware": hardware})


def test_a_switch_to_more_replicas_takes_room_from_the_kv_cache(cluster, trace, model) -> None:
    small = with_room(cluster, model, 3, 400)
    serving = dataclasses.replace(SERVING, memory=MemorySpec(kv_bytes_per_token=1000, usable=1.0))
    lanes = []

    class Watch:
        def start(self, run) -> None:
            lanes.append(run.loop.groups[0].lanes)

    def serve(slots):
        switch = PlanSwitch(contiguous_plan(slots=slots), at_us=2e3)
        return simulate(contiguous_plan(), steady_workload(), small, trace=trace, model=model,
                        interventions=[switch, Watch()], routing="every_step", serving=serving)

    serve(3)
    assert lanes[0].kv_free_G == [400] * 4
    with pytest.raises(InfeasibleError, match="device 0: the plan's experts need"):
        serve(4)


def test_experts_beyond_a_devices_memory_are_refused_without_kv_too(cluster, trace, model) -> None:
    small = with_room(cluster, model, 3, 1)
    with pytest.raises(InfeasibleError, match="memory_bytes allows"):
        run(contiguous_plan(slots=4), small, trace, model)
