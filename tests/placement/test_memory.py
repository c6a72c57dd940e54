"""Does it fit: experts beside other weights and a reserve, refused only where sizes are known.

Bytes are reckoned by hand. The model: 10 layers of 16 experts of 3 · 64 · 128 · 2 = 49,152 bytes,
so that one slot in every layer takes 491,520.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loadmaster as lm
from loadmaster.errors import InfeasibleError, InputError, UsageError
from loadmaster.placement.cluster import Cluster, Device
from loadmaster.placement.memory import (
    default_slots,
    expert_memory,
    fitting_slots,
    limits_G,
    memory_notes,
    require_plan_fits,
    require_slots_fit,
)
from loadmaster.placement.plan import Plan
from loadmaster.simulator.serving.simulate import simulate
from loadmaster.traces.arrivals import Length, poisson
from loadmaster.traces.model_spec import ModelSpec
from loadmaster.traces.synth.generate import synth_trace

SLOT = 10 * 49_152
MODEL = ModelSpec(
    name="small", num_layers=10, num_experts=16, top_k=2, hidden=64, intermediate=128,
    dense_bytes=1_000_000,
)
STEPS = lm.StepSampler(tokens=64, concurrency=8)
TRACE = synth_trace(layers=10, experts=16, top_k=2, tokens=2_000, request_tokens=50)


def cluster(memory: int, slots: int, devices: int = 4, reserved: int | None = 0) -> Cluster:
    """Devices with so much memory; all else as an H100."""
    made = Cluster.preset("h100", devices_per_node=devices, slots_per_device=slots)
    hardware = made.hardware.model_copy(update={"memory_bytes": memory})
    return made.model_copy(update={"hardware": hardware}).with_reserved(reserved)


def quick(place: Cluster, **options: Any) -> lm.PlanResult:
    asked = {"method": "greedy", "effort": "fast", "model": MODEL, "steps": STEPS} | options
    return lm.plan(TRACE, place, **asked)


# ---- how many slots fit --------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "reserved", "slots"), [
    (1_000_000 + 5 * SLOT, 0, 5),
    (1_000_000 + 5 * SLOT - 1, 0, 4),
    (1_000_000 + 5 * SLOT + 700_000, 700_000, 5),
    (10_000_000, None, 16),              # 10 % kept free: 8,000,000 / 491,520 = 16.3
    (900_000, 0, 0),                     # less than the other weights alone
])
def test_slots_that_fit_are_reckoned_by_hand(memory: int, reserved: int | None, slots: int) -> None:
    assert fitting_slots(cluster(memory, 1, reserved=reserved), MODEL) == slots


def test_planning_refuses_what_cannot_fit_and_says_what_would() -> None:
    """3 slots fit where 4 are needed: 16 experts by 3 are 6 devices."""
    with pytest.raises(InfeasibleError) as refused:
        quick(cluster(1_000_000 + 3 * SLOT, 4))
    text = str(refused.value)
    assert "memory holds 3 slots" in text and "16 experts on 4 devices need 4" in text
    assert "it takes 6 such devices (2 nodes of 4)" in text and "\n" not in text
    assert quick(cluster(1_000_000 + 3 * SLOT, 3, devices=6)).plan.num_devices == 6


def test_spare_slots_that_do_not_fit_are_refused_by_number() -> None:
    with pytest.raises(InfeasibleError, match=r"memory holds 5 slots .* use 5 slots per device"):
        quick(cluster(1_000_000 + 5 * SLOT, 6))
    quick(cluster(1_000_000 + 5 * SLOT, 5))


def test_no_number_of_devices_helps_where_not_one_slot_fits() -> None:
    with pytest.raises(InfeasibleError, match="no number of such devices holds it"):
        quick(cluster(1_000_000 + SLOT // 2, 4))


def test_the_usual_spare_slots_give_way_to_memory() -> None:
    """An even share of 4 and one more; memory for 4 leaves the share; for 3, planning refuses."""
    assert default_slots(4, cluster(1_000_000 + 5 * SLOT, 4), MODEL) == (5, None)
    slots, said = default_slots(4, cluster(1_000_000 + 4 * SLOT, 4), MODEL)
    assert slots == 4
    assert said is not None and said.startswith("4 slots per device, not the usual 5")
    assert default_slots(4, cluster(1_000_000 + 3 * SLOT, 4), MODEL)[0] == 4
    assert default_slots(4, cluster(1, 4), None) == (5, None)


@given(memory=st.integers(1_000_001, 20_000_000), reserved=st.integers(0, 1_000_000),
       slots=st.integers(1, 24))
@settings(max_examples=100, deadline=None)
def test_what_is_not_refused_fits(memory: int, reserved: int, slots: int) -> None:
    place = cluster(memory, slots, reserved=reserved)
    taken = slots * SLOT + 1_000_000 + reserved
    if taken <= memory:
        assert require_slots_fit(place, MODEL) == ()
    else:
        with pytest.raises(InfeasibleError):
            require_slots_fit(place, MODEL)


# ---- what is known -------------------------------------------------------------------------------


def test_nothing_is_refused_without_sizes() -> None:
    shape = ModelSpec(num_layers=10, num_experts=16, top_k=2)
    assert require_slots_fit(cluster(1, 400), shape) == ()
    assert not expert_memory(cluster(1, 400), None).limited
    quick(cluster(1, 6), model=None)


def test_an_estimate_is_called_one() -> None:
    guessed = MODEL.model_copy(update={"dense_bytes": None})
    assert "of other weights, an estimate," in expert_memory(cluster(10**9, 4), guessed).reckoning()
    assert "an estimate" not in expert_memory(cluster(10**9, 4), MODEL).reckoning()


def test_a_cluster_files_own_limit_is_the_only_one() -> None:
    """`expert_memory_bytes` is what its author reckoned: neither reserve nor weights come off."""
    own = tuple(Device(node=0, slots=6, expert_memory_bytes=5 * SLOT) for _ in range(4))
    place = cluster(1_000_000, 6).model_copy(update={"devices": own})
    assert limits_G(place, MODEL).tolist() == [5 * SLOT] * 4
    made = quick(place)
    assert (made.plan.slots >= 0).sum(axis=(0, 2)).max() <= 50


def test_experts_of_different_sizes_count_their_own_bytes() -> None:
    """All 16 take 40 units a layer; 4 devices of 10 units a layer hold them, with no slot to spare
    by the largest."""
    unequal = MODEL.model_copy(update={"expert_bytes": (4000, 1000) * 8})
    held = 10 * 10_000
    place = cluster(1_000_000 + held, 16)
    made = quick(place, model=unequal)
    assert (made.plan.replicas_LGE().sum(axis=0) @ unequal.bytes_per_expert_E() <= held).all()
    with pytest.raises(InfeasibleError):
        quick(cluster(1_000_000 + held - 100, 16), model=unequal)


# ---- one reckoning in every verb -----------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> Plan:
    """A plan with 6 slots on each of 4 devices, all filled."""
    return quick(cluster(10**9, 6)).plan


def test_judging_says_what_does_not_fit(wide: Plan) -> None:
    """The figures stand, since the plan may run elsewhere; beside them it says it is too big."""
    small = cluster(1_000_000 + 5 * SLOT, 6)
    judged = lm.evaluate(wide, TRACE, small, steps=STEPS, model=MODEL)
    assert any(note.startswith("over memory: 2.9 MB of experts") for note in judged.notes)
    table = lm.compare({"wide": wide}, TRACE, small, steps=STEPS, model=MODEL)
    assert any(note.startswith("wide: over memory") for note in table.notes)
    assert memory_notes(wide, cluster(1_000_000 + 6 * SLOT, 6), MODEL) == ()
    assert memory_notes(wide, small, None) == ()


def test_a_plan_that_runs_is_taken_to_fit(wide: Plan) -> None:
    """Rebalancing does not argue with what is there, and says so; with more slots it does."""
    small = cluster(1_000_000 + 5 * SLOT, 6)
    moved = lm.rebalance(wide, TRACE, small, max_moves=4, model=MODEL, steps=STEPS, effort="fast")
    assert any("the current plan has as many" in note for note in moved.evidence.notes)
    assert any("the current plan has as many" in n for n in quick(
        small, current=wide, method="auto").evidence.notes)
    with pytest.raises(InfeasibleError, match="use 5 slots per device"):
        lm.rebalance(wide, TRACE, small.with_slots(7), max_moves=4, model=MODEL, steps=STEPS)


def test_a_simulation_serves_what_fits_and_refuses_what_cannot(wide: Plan) -> None:
    """Beside the other weights the experts must fit; a reserve that is not kept is said."""
    load = poisson(8, 5.0, prompt=Length(8), output=Length(4), seed=0)
    tight = cluster(1_000_000 + 6 * SLOT, 6, reserved=10)
    served = simulate(wide, load, tight, trace=TRACE, model=MODEL)
    assert any(note.startswith("over memory") for note in served.notes)
    with pytest.raises(InfeasibleError, match="beside 1,000,000 of other weights"):
        simulate(wide, load, cluster(1_000_000 + 6 * SLOT - 1, 6), trace=TRACE, model=MODEL)
    require_plan_fits(wide, tight, MODEL)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reserved", [-1, 10**9, 10**12])
def test_a_reserve_larger_than_memory_is_refused(reserved: int) -> None:
    with pytest.raises(UsageError, match="a device has 1,000,000,000 bytes of memory"):
        cluster(10**9, 4).with_reserved(reserved)


@pytest.mark.parametrize(("line", "match"), [
    ("reserved_bytes: -1", "reserved_bytes"),
    ("reserved_bytes: 85899345920", "leave nothing of a device's 85,899,345,920 bytes"),
    ("reserved_bytes: .nan", "reserved_bytes"),
])
def test_a_cluster_files_bad_reserve_is_named(tmp_path: Any, line: str, match: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(f"hardware: h100\nslots_per_device: 4\n{line}\n")
    with pytest.raises(InputError, match=match):
        Cluster.from_yaml(file)


@pytest.mark.parametrize("memory", ["-1", ".nan", "0", "many"])
def test_memory_that_is_none_is_refused(tmp_path: Any, memory: str) -> None:
    file = tmp_path / "cluster.yaml"
    made = Cluster.preset("h100", devices_per_node=2, slots_per_device=4)
    file.write_text(made.to_yaml().replace("memory_bytes: 85899345920", f"memory_bytes: {memory}"))
    with pytest.raises(InputError, match="memory_bytes"):
        Cluster.from_yaml(file)


def test_a_reserve_changes_no_plans_name() -> None:
    """What is kept free says nothing of devices: a plan stays the plan of its cluster."""
    place = cluster(10**9, 4)
    assert place.digest() == place.with_reserved(5_000).digest()
    assert np.isfinite(expert_memory(place, MODEL).bytes_G).all()
