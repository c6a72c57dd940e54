"""A model's sizes: known from its widths, listed expert by expert, or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loadmaster.errors import UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.lower_bounds import most_replicas
from loadmaster.placement.inspection.difference import diff_plans
from loadmaster.placement.plan import Plan
from loadmaster.placement.planning.layer_capacity import capacity_per_layer
from loadmaster.placement.planning.planner import plan
from loadmaster.placement.rebalancing.move_budget import Budget
from loadmaster.placement.rebalancing.rebalance import rebalance
from loadmaster.placement.rebalancing.survivors import survivors_plan
from loadmaster.placement.rebalancing.switch_payback import price_moves
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace

WIDTHS = dict(hidden=8, intermediate=4)
EACH = 3 * 8 * 4 * 2             # bytes of an expert of these widths


def spec(**sizes: Any) -> ModelSpec:
    return ModelSpec(num_layers=1, num_experts=4, top_k=1, **sizes)


@pytest.mark.parametrize(("sizes", "time", "bytes_"), [
    ({}, False, False), ({"hidden": 8}, False, False), ({"intermediate": 4}, False, False),
    (WIDTHS, True, True), ({"expert_bytes": (1, 2, 3, 4)}, False, True),
    (WIDTHS | {"expert_bytes": (1, 2, 3, 4)}, True, True),
])
def test_widths_tell_time_and_bytes_and_a_list_tells_bytes(
    sizes: dict[str, Any], time: bool, bytes_: bool
) -> None:
    model = spec(**sizes)
    assert (model.knows_sizes, model.knows_bytes) == (time, bytes_)
    listed = model.listed_bytes_E()
    assert (None if listed is None else listed.tolist()) == (
        [1, 2, 3, 4] if "expert_bytes" in sizes else None
    )


OLD = Plan(slots=np.array([[[0, 1], [2, 3], [0, 1]]], np.int16), num_experts=4)
NEW = Plan(slots=np.array([[[0, 3], [2, 1], [0, 1]]], np.int16), num_experts=4)
FULL = Cluster.preset("h100", devices_per_node=3, slots_per_device=2)
TIGHT = FULL.model_copy(update={"devices": tuple(
    d.model_copy(update={"expert_memory_bytes": 2 * EACH}) for d in FULL.devices
)})
TRACE = RoutingTrace.from_arrays(
    np.random.default_rng(0).integers(0, 4, (400, 1, 1)), num_experts=4,
    request=np.arange(400) // 20,
)
STEPS = StepSampler(tokens=16, concurrency=4)

ASKED: dict[str, Any] = {
    "the price of a switch": lambda model: price_moves(OLD, NEW, FULL, model),
    "a difference": lambda model: diff_plans(OLD, NEW, model),
    "a budget of bytes": lambda model: Budget.of(OLD, model, None, 2 * EACH).price_E(4).tolist(),
    "the bytes of a layer": lambda model: capacity_per_layer(np.ones((1, 4)), TIGHT, model),
    "most replicas": lambda model: most_replicas(TIGHT, model, 1, 4),
    "survivors": lambda model: survivors_plan(OLD, frozenset({1}), TIGHT, model).slots.tolist(),
    "moves within bytes": lambda model: rebalance(
        OLD, TRACE, FULL, model=model, objective="balance", max_bytes=EACH, steps=STEPS
    ).moves,
    "memory of devices": lambda model: plan(
        TRACE, TIGHT, model=model, objective="balance", steps=STEPS, effort="fast"
    ).plan.slots.tolist(),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_bytes_that_are_listed_count_as_bytes_of_widths_do(asked: Any) -> None:
    """Whoever asks for bytes alone gets the same answer, whichever way the model tells them."""
    by_widths, by_list = asked(spec(**WIDTHS)), asked(spec(expert_bytes=(EACH,) * 4))
    assert repr(by_list) == repr(by_widths)


def test_without_bytes_no_budget_of_bytes_can_be_kept() -> None:
    with pytest.raises(UsageError, match="max_bytes needs the experts' sizes"):
        Budget.of(OLD, spec(hidden=8), None, EACH)


def test_bytes_alone_tell_no_time_so_nothing_pays_back_in_steps() -> None:
    listed = spec(expert_bytes=(EACH,) * 4)
    moved = rebalance(OLD, TRACE, FULL, model=listed, objective="balance", steps=STEPS)
    assert moved.pays_back_after_steps is None
