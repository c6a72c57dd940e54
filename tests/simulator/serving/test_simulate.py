"""simulate(): whole runs, and what must hold in any of them."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from loadmaster.errors import InfeasibleError, InputError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.plan import Plan
from loadmaster.simulator.pricing.memory import MemorySpec
from loadmaster.simulator.serving.batching import BatchLimits
from loadmaster.simulator.serving.result import Slo
from loadmaster.simulator.serving.simulate import Serving, simulate
from loadmaster.simulator.serving.step_time_bank import BankSpec, grid
from loadmaster.simulator.serving.workload import Workload
from loadmaster.traces.model_spec import ModelSpec

from ..conftest import EXPERTS, LAYERS, contiguous_plan, skewed_trace, steady_workload

SMALL = Serving(BatchLimits(step_tokens=128, max_requests=32))


def run(plan, workload, cluster, trace, model, **more):
    more = {"serving": SMALL, "routing": "every_step"} | more
    return simulate(plan, workload, cluster, trace=trace, model=model, **more)


def test_requests_tokens_and_time_are_conserved(plan, workload, cluster, trace, model) -> None:
    result = run(plan, workload, cluster, trace, model)
    steps, requests = result.steps, result.requests
    assert steps.prefill_tokens.sum() == workload.prompt_tokens.sum()
    assert steps.decode_tokens.sum() == (workload.output_tokens - 1).sum()
    assert (requests.arrival_ns <= requests.start_ns).all()
    assert (requests.start_ns < requests.first_token_ns).all()
    assert (requests.first_token_ns <= requests.finish_ns).all()
    ends = steps.start_ns + steps.duration_ns
    assert (steps.start_ns[1:] >= ends[:-1]).all(), "steps of one group never overlap"
    assert ends[-1] == requests.finish_ns.max()


def test_same_seed_same_bytes_and_another_seed_other_routing(
    plan, workload, cluster, trace, model
) -> None:
    for routing in ("every_step", "bank"):
        first, again, other = (
            run(plan, workload, cluster, trace, model, routing=routing, seed=seed).to_json()
            for seed in (0, 0, 1)
        )
        assert again == first != other


def test_shares_of_a_step_add_up_to_one(plan, workload, cluster, trace, model) -> None:
    blame = run(plan, workload, cluster, trace, model).blame
    assert sum(blame.shares.values()) == pytest.approx(1.0)
    assert blame.critical_path_us < blame.step_us
    assert sum(blame.slowest_share_G) == pytest.approx(1.0)
    assert sum(layer.layer_us for layer in blame.layers) == pytest.approx(blame.step_us)


def test_even_dispatch_is_blamed_for_what_a_better_split_saves(cluster, trace, model) -> None:
    """Replicas of the hot experts, tokens split evenly: the wait is not the placement's alone."""
    big = cluster.with_slots(3)
    plan = contiguous_plan(slots=3, dispatch="even")
    load = Workload.from_arrays(np.zeros(64), np.full(64, 200), np.full(64, 2))
    serving = Serving(BatchLimits(step_tokens=4096, max_requests=64))
    fat = model.model_copy(update={"hidden": 4096, "intermediate": 4096})
    even = run(plan, load, big, trace, fat, serving=serving).blame
    best = run(plan, load, big, trace, fat, serving=serving, dispatch="balanced").blame
    assert even.shares["dispatch"] > 0.01
    assert best.shares["dispatch"] < even.shares["dispatch"] / 3


def test_a_hot_device_is_named(cluster, trace, model) -> None:
    """Front-domain tokens love expert 0 and 1, which live together on device 0."""
    front = trace.slice_domains(["front"])
    blame = run(contiguous_plan(), steady_workload(), cluster, front, model).blame
    assert int(np.argmax(blame.slowest_share_G)) == 0
    assert all(layer.slowest_device == 0 for layer in blame.layers)


def test_the_bank_agrees_with_routing_every_step(plan, cluster, trace, model) -> None:
    load = steady_workload(requests=150)
    exact = run(plan, load, cluster, trace, model)
    drawn = run(plan, load, cluster, trace, model, routing="bank", bank=BankSpec(samples=8))
    assert drawn.step_time.mean == pytest.approx(exact.step_time.mean, rel=0.01)
    assert drawn.blame.critical_path_us == pytest.approx(exact.blame.critical_path_us, rel=0.03)


def test_domains_of_requests_choose_the_tokens(cluster, trace, model) -> None:
    """The same plan is off balance for either domain's requests, in opposite directions."""
    names = ("front", "back")
    load = steady_workload()
    results = {
        name: run(contiguous_plan(), load.with_domains(names, [(0.0, mix)]), cluster, trace, model)
        for name, mix in {"front": (1, 0), "back": (0, 1)}.items()
    }
    assert int(np.argmax(results["front"].blame.slowest_share_G)) == 0
    assert int(np.argmax(results["back"].blame.slowest_share_G)) == 3


def test_more_load_never_makes_requests_faster(plan, cluster, trace, model) -> None:
    load = steady_workload(requests=80)
    waits = [
        run(plan, load.scaled(rate), cluster, trace, model).latency.mean for rate in (0.5, 4, 16)
    ]
    assert waits[0] < waits[1] < waits[2]


def test_faster_links_never_make_a_run_longer(plan, workload, cluster, trace, model) -> None:
    hardware = cluster.hardware
    faster = {
        side: getattr(hardware, side).model_copy(
            update={"nic_bytes_per_s": 4 * getattr(hardware, side).nic_bytes_per_s}
        )
        for side in ("dispatch", "combine")
    }
    quick = cluster.model_copy(update={"hardware": hardware.model_copy(update=faster)})
    slow_run = run(plan, workload, cluster, trace, model)
    assert run(plan, workload, quick, trace, model).step_time.mean <= slow_run.step_time.mean


def test_names_of_devices_do_not_matter(workload, cluster, trace, model) -> None:
    """Swap the devices of each node: the same steps, with the blame on the other name."""
    plan = contiguous_plan()
    swap = np.array([1, 0, 3, 2])
    renamed = Plan(plan.slots[:, swap], EXPERTS, dispatch=plan.dispatch)
    no_homes = cluster.with_traffic("allgather")    # homes are dealt by device number
    first = run(plan, workload, no_homes, trace, model)
    second = run(renamed, workload, no_homes, trace, model)
    np.testing.assert_allclose(first.steps.duration_ns, second.steps.duration_ns, atol=1)
    np.testing.assert_allclose(first.device_busy_G[swap], second.device_busy_G, rtol=1e-6)


def test_goodput_counts_requests_that_met_both(plan, workload, cluster, trace, model) -> None:
    loose = run(plan, workload, cluster, trace, model, slo=Slo(ttft_us=1e9, tpot_us=1e9))
    assert loose.goodput_requests_per_s == pytest.approx(loose.requests_per_s)
    tight = run(plan, workload, cluster, trace, model, slo=Slo(ttft_us=1e-3, tpot_us=1e9))
    assert tight.goodput_requests_per_s == 0.0


def test_two_groups_share_one_queue_and_halve_the_wait(plan, cluster, trace, model) -> None:
    load = steady_workload(requests=120, gap_us=5.0)
    one = run(plan, load, cluster, trace, model)
    two = run(plan, load, cluster, trace, model, serving=dataclasses.replace(SMALL, groups=2))
    assert set(two.steps.group.tolist()) == {0, 1}
    assert two.wait.mean < 0.7 * one.wait.mean


def test_replicas_take_memory_from_the_kv_cache(cluster, trace, model) -> None:
    """The same devices with one more slot of experts admit fewer requests at a time."""
    expert_bytes = int(model.bytes_per_expert_E()[0])
    room = LAYERS * 3 * expert_bytes + 400 * 1000
    hardware = cluster.hardware.model_copy(update={"memory_bytes": room})
    memory = MemorySpec(kv_bytes_per_token=1000, usable=1.0)
    serving = dataclasses.replace(SMALL, memory=memory)
    load = steady_workload(requests=60, gap_us=1.0)
    waits = {}
    for slots in (2, 3):
        small = cluster.model_copy(update={"hardware": hardware}).with_slots(slots)
        plan = contiguous_plan(slots=slots)
        waits[slots] = run(plan, load, small, trace, model, serving=serving).wait.mean
    assert waits[3] > waits[2]


def test_experts_that_do_not_fit_are_refused(plan, workload, cluster, trace, model) -> None:
    tiny = cluster.model_copy(
        update={"hardware": cluster.hardware.model_copy(update={"memory_bytes": 1_000_000})}
    )
    serving = dataclasses.replace(SMALL, memory=MemorySpec(kv_bytes_per_token=1000))
    with pytest.raises(InfeasibleError, match="the plan's experts need"):
        run(plan, workload, tiny, trace, model, serving=serving)


def test_a_plan_for_another_cluster_or_model_is_refused(workload, cluster, trace, model) -> None:
    with pytest.raises(InputError, match="the plan is for 8 devices"):
        run(contiguous_plan(devices=8, slots=1), workload, cluster, trace, model)
    other = ModelSpec(num_layers=LAYERS + 1, num_experts=EXPERTS, top_k=2, hidden=8, intermediate=8)
    with pytest.raises(InputError, match="model: 4 layers"):
        run(contiguous_plan(), workload, cluster, trace, other)
    unsized = ModelSpec(num_layers=LAYERS, num_experts=EXPERTS, top_k=2)
    with pytest.raises(UsageError, match="hidden and intermediate"):
        run(contiguous_plan(), workload, cluster, trace, unsized)


def test_a_plan_made_for_other_sizes_or_more_slots_is_refused(
    plan, workload, cluster, trace, model
) -> None:
    ours = dataclasses.replace(plan, model_digest=model.digest())
    simulate(ours, workload.head(1), cluster, trace=trace, model=model, routing="every_step")
    wider = model.model_copy(update={"hidden": 2 * model.hidden})
    with pytest.raises(InputError, match="was made for model"):
        simulate(ours, workload, cluster, trace=trace, model=wider)
    with pytest.raises(InputError, match="fills 4 slots of device 0"):
        simulate(contiguous_plan(slots=4), workload, cluster, trace=trace, model=model)


def test_a_domain_the_trace_lacks_is_named(plan, workload, cluster, trace, model) -> None:
    load = workload.with_domains(("front", "poetry"), [(0.0, (1, 1))])
    with pytest.raises(InputError, match="'poetry' is not in the trace"):
        run(plan, load, cluster, trace, model)


def test_prompts_read_prefill_tokens_and_answers_decode_tokens(plan, cluster, model) -> None:
    """Prefill tokens choose experts 0 and 1 only, decode tokens 6 and 7 only."""
    ids = np.zeros((400, LAYERS, 2), np.int64)
    phase = np.arange(400) % 2
    ids[phase == 0] = (0, 1)
    ids[phase == 1] = (6, 7)
    trace = dataclasses.replace(
        skewed_trace(400), ids=ids.astype(np.uint8), phase=phase.astype(np.uint8), domain=None
    )
    prompts_only = Workload.from_arrays([0.0], [50], [1])
    assert run(plan, prompts_only, cluster, trace, model).blame.slowest_share_G[0] == 1.0
    mostly_answers = Workload.from_arrays([0.0], [1], [50])
    assert run(plan, mostly_answers, cluster, trace, model).blame.slowest_share_G[3] > 0.9


def test_the_banks_sizes_start_at_one_and_end_at_the_largest() -> None:
    sizes = grid(1000, 1.25)
    assert sizes[:4] == [0, 1, 2, 3] and sizes[-1] == 1000
    assert all(a < b <= max(a + 1, 1.25 * a + 0.5) for a, b in itertools.pairwise(sizes))


def test_a_preset_serves_out_of_the_box(trace, model, plan) -> None:
    """Defaults: default limits, no memory limit, the bank."""
    cluster = Cluster.preset("h100", devices_per_node=4, slots_per_device=2)
    result = simulate(plan, steady_workload(20), cluster, trace=trace, model=model)
    assert result.requests_per_s > 0 and result.to_dict()["requests"] == 20
