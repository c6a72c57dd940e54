"""One plan on a trace: the figures by their definitions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.evaluate import evaluate, imbalance_of, peak_of, resolve_dispatch
from loadmaster.placement.plan import DispatchSpec, Plan
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace

PLACE = Cluster.preset("h100", devices_per_node=2, slots_per_device=2)
CONTIGUOUS = Plan(slots=np.array([[[0, 1], [2, 3]]]), num_experts=4)
STORED = StepSampler(tokens=4, order="stored")


def trace(*rows: list[int], **more: object) -> RoutingTrace:
    ids = np.array(rows)[:, None, :]
    return RoutingTrace.from_arrays(ids, num_experts=4, **more)  # type: ignore[arg-type]


# Two steps of four top-1 tokens: all on device 0; then evenly.
TWO = trace([0], [0], [1], [1], [0], [1], [2], [3], source=[0, 1] * 4)


def test_imbalance_is_busiest_over_mean_step_by_step() -> None:
    result = evaluate(CONTIGUOUS, TWO, PLACE, steps=STORED)
    assert result.imbalance_WL.tolist() == [[2.0], [1.0]]
    assert result.imbalance_mean == 1.5 and result.imbalance_worst == 2.0
    assert result.imbalance_p99 == pytest.approx(1.99)
    assert result.balancedness == pytest.approx((1 / 2 + 1) / 2)    # mean of ratios
    assert result.imbalance_L.tolist() == [1.5]
    assert result.steps == 2 and result.dispatch == "balanced"
    assert result.step_time_us is None and result.layer_time_us is None


def test_copies_are_per_token_and_layer() -> None:
    """Homes alternate: of eight tokens, four are computed where they live."""
    result = evaluate(CONTIGUOUS, TWO, PLACE, steps=STORED)
    assert result.remote_device_copies_per_token == 0.5
    assert result.remote_node_copies_per_token == 0
    assert result.active_experts_per_device == pytest.approx((2 + 0 + 2 + 2) / 4)
    two_nodes = Cluster.preset("h100", nodes=2, devices_per_node=1, slots_per_device=2)
    assert evaluate(CONTIGUOUS, TWO, two_nodes, steps=STORED).remote_node_copies_per_token == 0.5


def test_speed_counts_time_not_tokens() -> None:
    fast = Cluster.preset("h100", devices_per_node=2, slots_per_device=2, speeds=[3.0, 1.0])
    level = imbalance_of(np.array([[[30, 10]], [[10, 10]], [[0, 0]]]), fast)
    assert level[0, 0] == 1.0
    assert level[1, 0] == pytest.approx(10 / ((10 / 3 + 10) / 2))
    assert np.isnan(level[2, 0])


def test_the_peak_tells_a_slow_device_from_a_fast_one() -> None:
    """All tokens on one of two devices is an imbalance of 2 either way, but not as slow."""
    fast = Cluster.preset("h100", devices_per_node=2, slots_per_device=2, speeds=[3.0, 1.0])
    tokens = np.array([[[40, 0]], [[0, 40]], [[30, 10]], [[0, 0]]])
    assert imbalance_of(tokens, fast)[:2, 0].tolist() == [2.0, 2.0]
    assert peak_of(tokens, fast)[:3, 0] == pytest.approx([4 / 3, 4.0, 1.0])
    assert np.isnan(peak_of(tokens, fast)[3, 0])
    equal = np.random.default_rng(0).integers(0, 50, (5, 2, 2)) + 1
    assert peak_of(equal, PLACE) == pytest.approx(imbalance_of(equal, PLACE))
    result = evaluate(CONTIGUOUS, TWO, fast, steps=STORED)
    assert result.peak_WL[:, 0] == pytest.approx([4 / 3, 2.0])
    assert result.peak_mean == pytest.approx(5 / 3)


def test_a_plan_that_fills_more_slots_than_there_are_is_refused() -> None:
    small = Cluster.preset("h100", devices_per_node=2, slots_per_device=1)
    with pytest.raises(InputError, match="fills 2 slots of device 0 in layer 0"):
        evaluate(CONTIGUOUS, TWO, small, steps=STORED)
    wide = Plan(slots=np.array([[[0, 1, -1], [2, 3, -1]]]), num_experts=4)
    assert evaluate(wide, TWO, PLACE, steps=STORED).steps == 2      # empty slots do not count


def test_cells_without_tokens_are_left_out_and_said() -> None:
    ids = np.array([[[0], [1]], [[0], [1]]] * 4)
    k = np.array([[1, 1]] * 4 + [[1, 0]] * 4)
    half = RoutingTrace.from_arrays(ids, num_experts=4, k_of_token=k)
    plan = Plan(slots=np.repeat(CONTIGUOUS.slots, 2, axis=0), num_experts=4)
    result = evaluate(plan, half, PLACE, steps=STORED)
    assert any("1 of 4 (step, layer) cells had no tokens" in note for note in result.notes)
    assert result.imbalance_mean == 2.0
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_layer_nobody_used_has_no_figure() -> None:
    ids = np.array([[[0], [1]]] * 4)
    trace_ = RoutingTrace.from_arrays(ids, num_experts=4, k_of_token=np.array([[1, 0]] * 4))
    plan = Plan(slots=np.repeat(CONTIGUOUS.slots, 2, axis=0), num_experts=4)
    result = evaluate(plan, trace_, PLACE, steps=STORED)
    assert np.isnan(result.imbalance_L[1]) and result.to_dict()["imbalance_L"] == [2.0, None]
    nobody = RoutingTrace.from_arrays(ids, num_experts=4, k_of_token=np.zeros((4, 2), int))
    with pytest.raises(InputError, match="no step holds a token"):
        evaluate(plan, nobody, PLACE, steps=STORED)


def test_time_comes_with_a_model() -> None:
    model = ModelSpec(num_layers=1, num_experts=4, top_k=1, hidden=2048, intermediate=768)
    result = evaluate(CONTIGUOUS, TWO, PLACE, steps=STORED, model=model)
    assert result.step_time_us is not None and result.layer_time_us is not None
    assert result.layer_time_us.tolist() == pytest.approx([result.step_time_us])
    assert result.step_time_us_W is not None and len(result.step_time_us_W) == 2
    sizes = model.model_copy(update={"expert_bytes": (10**8, 10**6, 10**6, 10**6)})
    heavy = evaluate(CONTIGUOUS, TWO, PLACE, steps=STORED, model=sizes)
    assert heavy.step_time_us is not None and heavy.step_time_us > result.step_time_us
    other = model.model_copy(update={"num_layers": 2})
    with pytest.raises(InputError, match="the model model has 2 MoE layers"):
        evaluate(CONTIGUOUS, TWO, PLACE, steps=STORED, model=other)
    made_for = Plan(slots=CONTIGUOUS.slots, num_experts=4, model_digest="0123")
    with pytest.raises(InputError, match="plan again for this model"):
        evaluate(made_for, TWO, PLACE, steps=STORED, model=model)


def test_the_dispatch_to_judge_under() -> None:
    own = DispatchSpec(policy="balanced", parameters={"slack": 0.1})
    plan = Plan(slots=CONTIGUOUS.slots, num_experts=4, dispatch=own)
    assert resolve_dispatch(None, plan) == own
    assert resolve_dispatch("balanced", plan) == own          # a bare name keeps the parameters
    assert resolve_dispatch("even", plan) == DispatchSpec(policy="even")
    assert resolve_dispatch(DispatchSpec(), plan) == DispatchSpec()
    with pytest.raises(UsageError, match="unknown dispatch"):
        resolve_dispatch("odd", plan)


def test_duplicates_share_a_device_and_read_weights_twice_under_even() -> None:
    """An imported plan may hold an expert twice on a device: both slots are active."""
    plan = Plan(slots=np.array([[[0, 0, 1], [2, 3, -1]]]), num_experts=4)
    place = Cluster.preset("h100", devices_per_node=2, slots_per_device=3)
    steps = StepSampler(tokens=8, order="stored")
    even = evaluate(plan, TWO, place, steps=steps, dispatch="even")
    balanced = evaluate(plan, TWO, place, steps=steps, dispatch="balanced")
    assert even.active_experts_per_device == pytest.approx(5 / 2)
    assert balanced.active_experts_per_device == pytest.approx(4 / 2)
    assert even.imbalance_mean == balanced.imbalance_mean


@pytest.mark.parametrize(
    ("file", "layers", "experts", "mean", "worst"),
    [
        ("gptoss20b_decode.npz", 24, 32, 1.42, 1.87),
        ("esft_law_translation.npz", 26, 64, 1.41, 1.70),
    ],
)
def test_contiguous_on_real_routing(
    real_data: Path, file: str, layers: int, experts: int, mean: float, worst: float
) -> None:
    """The published facts of both traces: hottest of 8 GPUs over the mean, whole trace at once."""
    with np.load(real_data / "routing" / file) as stored:
        real = RoutingTrace.from_arrays(stored["ids"], num_experts=experts, request=stored["seq"])
    slots = np.broadcast_to(np.arange(experts).reshape(8, -1), (layers, 8, experts // 8))
    plan = Plan(slots=slots, num_experts=experts)
    place = Cluster.preset("h100", slots_per_device=experts // 8)
    whole = StepSampler(tokens=real.num_tokens, order="stored")
    result = evaluate(plan, real, place, steps=whole, dispatch="even")
    assert result.imbalance_mean == pytest.approx(mean, abs=0.005)
    assert result.imbalance_worst == pytest.approx(worst, abs=0.005)
