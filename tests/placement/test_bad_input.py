"""Odd and bad input to plan(): a right answer or a clear error, never a silent one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import InfeasibleError, InputError, LoadmasterError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.lower_bounds import BoundError
from loadmaster.placement.methods.baselines import LAYER_METHODS
from loadmaster.placement.planning.planner import METHODS, PlanResult, plan
from loadmaster.placement.search import layer_task
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace

STEPS = StepSampler(tokens=16, concurrency=4)
CLUSTER = Cluster.preset("h100", devices_per_node=4, slots_per_device=3)


def quick(source: RoutingTrace | Profile, cluster: Cluster = CLUSTER, **asked: Any) -> PlanResult:
    return plan(source, cluster, **({"steps": STEPS, "effort": "fast"} | asked))


def trace_of(ids: Any, experts: int, **columns: Any) -> RoutingTrace:
    """Requests of 20 tokens."""
    ids = np.asarray(ids)
    return RoutingTrace.from_arrays(
        ids, num_experts=experts, request=np.arange(len(ids)) // 20, **columns
    )


def random_trace(tokens: int, experts: int, seed: int = 0) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    return trace_of(rng.integers(0, experts, (tokens, 2, 1)), experts)


# ---- no load, all load, little load -----------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_trace_in_which_no_token_chose_anybody_is_placed_and_said(method: str) -> None:
    idle = trace_of(np.zeros((200, 2, 1), int), 8, k_of_token=np.zeros((200, 2), np.uint8))
    result = quick(idle, method=method)
    assert result.evidence.objective == 1 and result.evidence.gap == 0
    assert any("no token used layer 0 (2 such layers)" in note for note in result.evidence.notes)


def test_loads_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="layer 1 has no load at all"):
        Profile.from_loads([[1.0, 2.0], [0.0, 0.0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_loads_that_are_no_loads_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="loads must be finite and >= 0"):
        Profile.from_loads([[1.0, bad]])


@pytest.mark.parametrize("dispatch", ["balanced", "even"])
def test_one_expert_with_all_the_load_gets_a_copy_everywhere(dispatch: str) -> None:
    load = np.zeros((1, 8))
    load[0, 5] = 1e6
    result = quick(Profile.from_loads(load), dispatch=dispatch)
    assert result.plan.replicas_LE[0, 5] == 4
    assert result.evidence.objective == pytest.approx(1)


def test_one_expert_with_all_the_load_and_no_spare_slot_meets_its_bound() -> None:
    load = np.zeros((1, 8))
    load[0, 5] = 1e6
    result = quick(Profile.from_loads(load), CLUSTER.with_slots(2), dispatch="even")
    assert result.evidence.objective == pytest.approx(4)
    assert result.evidence.bound == pytest.approx(4)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_experts_is_enough_to_plan(method: str) -> None:
    few = random_trace(40, 64)
    wide = Cluster.preset("h100", devices_per_node=4, slots_per_device=20)
    result = quick(few, wide, method=method)
    assert (result.plan.replicas_LE >= 1).all()
    assert any("too short a trace to hold back" in note for note in result.evidence.notes)


def test_a_layer_nobody_used_is_planned_beside_one_that_was() -> None:
    ids = np.random.default_rng(0).integers(0, 8, (400, 2, 1))
    k_of_token = np.tile(np.array([1, 0], np.uint8), (400, 1))
    result = quick(trace_of(ids, 8, k_of_token=k_of_token))
    assert result.evidence.layers[1].objective == 1
    assert (result.plan.replicas_LE[1] >= 1).all()


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(InputError):
        quick(trace_of(np.zeros((0, 1, 1), int), 4))


# ---- slots ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_slots_that_do_not_divide_are_planned_or_refused_with_another_way(method: str) -> None:
    """Ten experts on three devices of four slots."""
    three = Cluster.preset("h100", devices_per_node=3, slots_per_device=4)
    trace = random_trace(400, 10)
    made = quick(trace, three, method=method).plan
    assert (made.replicas_LE >= 1).all()
    assert ((made.slots >= 0).sum(axis=2) <= 4).all()


def test_eplb_on_unequal_slots_is_refused_and_says_what_can() -> None:
    devices = [
        device.model_copy(update={"slots": slots})
        for device, slots in zip(CLUSTER.devices, (3, 3, 3, 1), strict=True)
    ]
    uneven = Cluster(devices=tuple(devices), hardware=CLUSTER.hardware)
    with pytest.raises(InfeasibleError, match="use greedy or auto"):
        quick(random_trace(400, 8), uneven, method="eplb")
    for method in (*LAYER_METHODS, "auto", "affinity"):
        if not method.startswith("eplb"):
            made = quick(random_trace(400, 8), uneven, method=method).plan
            assert ((made.slots >= 0).sum(axis=2) <= [3, 3, 3, 1]).all()


def test_more_slots_than_experts_on_a_device_hold_no_expert_twice() -> None:
    roomy = Cluster.preset("h100", devices_per_node=2, slots_per_device=9)
    made = quick(random_trace(400, 4), roomy).plan
    assert made.duplicates == 0


# ---- devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf")])
def test_a_device_of_impossible_speed_is_refused(speed: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="speeds must be finite and above 0"):
        Cluster.preset("h100", devices_per_node=2, slots_per_device=2, speeds=[1.0, speed])
    path, written = tmp_path / "cluster.yaml", {"inf": ".inf", "nan": ".nan"}
    path.write_text(
        "hardware: h100\ndevices:\n- {node: 0, slots: 2}\n"
        f"- {{node: 0, slots: 2, speed: {written.get(str(speed), speed)}}}\n"
    )
    with pytest.raises(InputError, match=r"devices\.1\.speed"):
        Cluster.from_yaml(path)


# ---- numbers that lie -------------------------------------------------------------------------


def test_gates_that_are_not_numbers_are_refused() -> None:
    gates = np.full((40, 1, 1), 0.5)
    gates[7] = np.nan
    with pytest.raises(InputError, match="gates hold NaN"):
        trace_of(np.zeros((40, 1, 1), int), 4, gates=gates)


def test_ids_that_name_no_expert_are_refused() -> None:
    with pytest.raises(InputError, match="9"):
        trace_of(np.full((40, 1, 1), 9), 4)


@pytest.mark.parametrize("method", ["greedy", "auto", "affinity"])
def test_a_bound_above_the_objective_is_an_error_always(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever computed it: nothing is reported as better than the best possible."""
    monkeypatch.setattr(layer_task, "layer_bound", lambda _task: 99.0)
    with pytest.raises(BoundError, match="above the objective") as raised:
        quick(random_trace(400, 8), method=method)
    assert isinstance(raised.value, LoadmasterError)
