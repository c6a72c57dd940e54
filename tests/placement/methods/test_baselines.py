"""Methods that look at loads alone: what each promises, its ties, and what none may do."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loadmaster.errors import InfeasibleError
from loadmaster.foundation.arrays import SlotArray
from loadmaster.placement.methods.baselines import (
    LAYER_METHODS,
    LayerLoads,
    anticorrelation,
    contiguous,
    greedy,
    lpt_swap,
    require_capacity,
    round_robin,
)

LAYOUTS = json.loads((Path(__file__).parent / "engine_layouts.json").read_text())
OURS = ("contiguous", "round_robin", "greedy", "lpt_swap", "anticorrelation")
REPLICATING = ("greedy", "lpt_swap", "anticorrelation")


def layer(
    load: npt.ArrayLike, slots: list[int], speeds: list[float] | None = None, **more: object
) -> LayerLoads:
    load_WE = np.atleast_2d(np.asarray(load, np.float64))
    speed = np.ones(len(slots)) if speeds is None else np.array(speeds)
    return LayerLoads(load_WE, np.array(slots), speed, **more)  # type: ignore[arg-type]


def device_loads(slots_GC: SlotArray, load_E: npt.NDArray[np.float64]) -> list[float]:
    """Load of each device when replicas share evenly; counted one slot at a time."""
    replicas = [int((slots_GC == e).sum()) for e in range(len(load_E))]
    return [sum(load_E[e] / replicas[e] for e in row if e >= 0) for row in slots_GC]


def assert_valid(slots_GC: SlotArray, experts: int, slots: list[int]) -> None:
    held = [[int(e) for e in row if e >= 0] for row in slots_GC]
    assert {e for row in held for e in row} == set(range(experts))
    for row, most in zip(held, slots, strict=True):
        assert len(row) <= most
        assert len(set(row)) == len(row), "two replicas of one expert on a device"


# ---- what holds for all of them -----------------------------------------------------------------


@pytest.mark.parametrize("method", OURS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_expert_has_a_slot_and_no_device_two_copies(
    method: str, data: st.DataObject
) -> None:
    experts = data.draw(st.integers(1, 10))
    slots = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    load = data.draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts))
    if method == "contiguous":     # in proportion to slots: room on every device
        slots = [max(slots)] * len(slots)
    # Devices have no use for more slots than experts: only usable ones count as room.
    assume(sum(min(s, experts) for s in slots) >= experts)
    found = LAYER_METHODS[method](layer(load, slots))
    assert found.dtype == np.int16 and found.shape == (len(slots), max(slots))
    assert_valid(found, experts, slots)


@pytest.mark.parametrize("method", sorted(LAYER_METHODS))
def test_the_same_loads_give_the_same_slots(method: str) -> None:
    load_WE = np.random.default_rng(0).integers(0, 100, (5, 8))
    first, second = (LAYER_METHODS[method](layer(load_WE, [3, 3, 3, 3])) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("method", REPLICATING)
def test_replicating_methods_fill_every_slot(method: str) -> None:
    found = LAYER_METHODS[method](layer([9, 8, 7, 6, 5, 4, 3, 2], [3, 3, 3, 3]))
    assert (found >= 0).all()


@pytest.mark.parametrize("method", REPLICATING)
def test_no_expert_gets_more_copies_than_there_are_devices(method: str) -> None:
    found = LAYER_METHODS[method](layer([1000, 1, 1], [3, 3]))
    assert_valid(found, 3, [3, 3])
    assert (found == 0).sum() == 2


@pytest.mark.parametrize("method", OURS)
def test_a_layer_nobody_used_is_placed_all_the_same(method: str) -> None:
    assert_valid(LAYER_METHODS[method](layer(np.zeros((3, 6)), [2, 2, 2])), 6, [2, 2, 2])


def test_too_few_slots_are_infeasible_and_the_message_says_how_many() -> None:
    with pytest.raises(InfeasibleError, match="8 experts: 2 slots short"):
        require_capacity(8, np.array([2, 2, 2]))
    require_capacity(6, np.array([2, 2, 2]))


@pytest.mark.parametrize("method", REPLICATING)
def test_replicating_methods_refuse_too_few_slots(method: str) -> None:
    with pytest.raises(InfeasibleError, match="1 slots short"):
        LAYER_METHODS[method](layer([1, 1, 1, 1, 1], [2, 2]))


# ---- what each promises -------------------------------------------------------------------------


def test_contiguous_cuts_consecutive_blocks_and_leaves_spare_slots_empty() -> None:
    assert contiguous(layer(np.ones(6), [3, 3, 3])).tolist() == [[0, 1, -1], [2, 3, -1], [4, 5, -1]]
    uneven = contiguous(layer(np.ones(5), [3, 3]))
    assert uneven.tolist() == [[0, 1, 2], [3, 4, -1]]


@pytest.mark.parametrize("case", LAYOUTS["default_layout"]["cases"])
def test_contiguous_is_the_layout_that_vllm_starts_with(case: dict[str, Any]) -> None:
    """As its own function gave it (`benchmarks/record_engine_choices.py`)."""
    experts, ranks = case["experts"], case["ranks"]
    for width in (-(-experts // ranks), -(-experts // ranks) + 2):
        found = contiguous(layer(np.ones(experts), [width] * ranks))
        assert [row[row >= 0].tolist() for row in found] == case["held"]


def test_contiguous_follows_unequal_slots() -> None:
    assert contiguous(layer(np.ones(6), [4, 2])).tolist() == [[0, 1, 2, 3], [4, 5, -1, -1]]


def test_round_robin_deals_like_cards_and_passes_full_devices_over() -> None:
    assert round_robin(layer(np.ones(5), [2, 2, 2])).tolist() == [[0, 3], [1, 4], [2, -1]]
    assert round_robin(layer(np.ones(5), [1, 3, 1])).tolist() == [
        [0, -1, -1], [1, 3, 4], [2, -1, -1]
    ]


def test_greedy_puts_the_heaviest_where_it_would_finish_first() -> None:
    assert greedy(layer([7, 6, 5, 4], [2, 2])).tolist() == [[0, 3], [1, 2]]


def test_greedy_breaks_ties_by_the_lower_expert_then_the_lower_device() -> None:
    assert greedy(layer([5, 5, 5, 5], [2, 2])).tolist() == [[0, 2], [1, 3]]


def test_greedy_copies_what_is_hot() -> None:
    found = greedy(layer([60, 10, 10, 10, 10], [2, 2, 2]))
    assert [(found == e).sum() for e in range(5)] == [2, 1, 1, 1, 1]


def test_greedy_gives_a_fast_device_more_work() -> None:
    load = np.array([4.0, 3.0, 2.0, 2.0, 1.0])
    slow, fast = device_loads(greedy(layer(load, [4, 4], [1.0, 3.0])), load)
    assert fast > slow


def test_greedy_keeps_within_the_bytes_a_device_has() -> None:
    found = greedy(layer(
        [9, 8, 1, 1], [2, 2], size_E=np.array([10.0, 10, 1, 1]), capacity_G=np.array([11.0, 11])
    ))
    assert_valid(found, 4, [2, 2])
    for row in found:
        assert sum([10, 10, 1, 1][e] for e in row if e >= 0) <= 11


def test_greedy_finds_the_only_packing_of_unequal_sizes() -> None:
    """Largest first puts a 300 on each side, and then the third 200 nowhere."""
    sizes = np.array([300.0, 300, 200, 200, 200])
    found = greedy(layer([1, 9, 2, 2, 5], [4, 4], size_E=sizes, capacity_G=np.array([600.0, 600])))
    assert sorted(sorted(e for e in row.tolist() if e >= 0) for row in found) == [
        [0, 1], [2, 3, 4]
    ]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=4, max_size=6),
    capacities=st.lists(st.integers(1, 9), min_size=2, max_size=3), slots=st.integers(2, 4),
)
def test_greedy_refuses_only_what_no_packing_holds(
    sizes: list[int], capacities: list[int], slots: int
) -> None:
    """Against every way to give each expert one device."""
    size_E = np.array(sizes, np.float64)
    assume(slots * len(capacities) >= len(sizes))
    homes_WE = np.array(list(itertools.product(range(len(capacities)), repeat=len(sizes))))
    on_WEG = homes_WE[:, :, None] == np.arange(len(capacities))
    possible = (
        ((on_WEG * size_E[:, None]).sum(axis=1) <= capacities) & (on_WEG.sum(axis=1) <= slots)
    ).all(axis=1).any()
    one = layer(
        np.arange(len(sizes)), [slots] * len(capacities), size_E=size_E,
        capacity_G=np.array(capacities, np.float64),
    )
    if not possible:
        with pytest.raises(InfeasibleError, match="proved"):
            greedy(one)
        return
    found = greedy(one)
    assert_valid(found, len(sizes), [slots] * len(capacities))
    for row, room in zip(found, capacities, strict=True):
        assert sum(sizes[e] for e in row if e >= 0) <= room


@settings(max_examples=40, deadline=None)
@given(load=st.lists(st.integers(0, 100), min_size=8, max_size=8), spare=st.integers(0, 1))
def test_swaps_never_make_the_hottest_device_hotter(load: list[int], spare: int) -> None:
    one = layer(load, [2 + spare] * 4)
    before, after = greedy(one), lpt_swap(one)
    assert max(device_loads(after, one.load_E)) <= max(device_loads(before, one.load_E)) + 1e-9
    np.testing.assert_array_equal(np.sort(before, axis=None), np.sort(after, axis=None))


def test_after_the_swaps_no_single_exchange_cools_the_hottest_device() -> None:
    load = np.random.default_rng(4).integers(1, 100, 9).astype(np.float64)
    found = lpt_swap(layer(load, [3, 3, 3]))
    hottest = max(device_loads(found, load))
    for (a, i), (b, j) in itertools.combinations(np.ndindex(3, 3), 2):
        other = found.copy()
        other[a, i], other[b, j] = found[b, j], found[a, i]
        assert max(device_loads(other, load)) >= hottest - 1e-9


def test_anticorrelation_parts_experts_that_are_busy_together() -> None:
    """0 and 1 peak in even steps, 2 and 3 in odd ones; all carry alike on average."""
    load_WE = np.tile([[10, 10, 1, 1], [1, 1, 10, 10]], (4, 1))
    found = anticorrelation(layer(load_WE, [2, 2]))
    for row in found:
        assert sorted(int(e) // 2 for e in row) == [0, 1]


def test_anticorrelation_of_loads_that_never_vary_is_finite_and_valid() -> None:
    assert_valid(anticorrelation(layer(np.full((4, 6), 3.0), [2, 2, 2])), 6, [2, 2, 2])


@pytest.mark.parametrize("method", ["eplb", "eplb_hierarchical"])
def test_eplb_refuses_unequal_slots(method: str) -> None:
    with pytest.raises(InfeasibleError, match="equally many slots"):
        LAYER_METHODS[method](layer(np.ones(4), [3, 1]))


def test_hierarchical_eplb_keeps_an_expert_group_in_one_node() -> None:
    found = LAYER_METHODS["eplb_hierarchical"](
        layer([9, 1, 8, 2, 7, 3, 6, 4], [2, 2, 2, 2], nodes=2, expert_groups=4)
    )
    for group in range(4):
        nodes = {g // 2 for g, row in enumerate(found) for e in row if e // 2 == group}
        assert len(nodes) == 1
