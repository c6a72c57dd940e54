"""EPLB as published: its own test vector, its tie rules, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import UsageError
from loadmaster.placement.methods.eplb import eplb

# The published example: 2 layers, 12 experts in 4 groups, 16 slots on 8 devices in 2 nodes.
LOAD_LE = np.array([
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
], np.float32)
PHYSICAL_TO_LOGICAL = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
LOGICAL_COUNT = [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
LOGICAL_TO_PHYSICAL = [
    [[12, -1], [15, 13], [11, -1], [6, -1], [7, 5], [0, 2],
     [1, -1], [3, -1], [4, -1], [9, -1], [8, 10], [14, -1]],
    [[13, -1], [15, 11], [8, -1], [14, -1], [9, -1], [10, 12],
     [2, 4], [0, -1], [6, 3], [7, -1], [1, -1], [5, -1]],
]


def test_the_published_example_is_reproduced_map_by_map() -> None:
    maps = eplb(LOAD_LE, slots=16, groups=4, nodes=2, devices=8)
    np.testing.assert_array_equal(maps.physical_to_logical_LS, PHYSICAL_TO_LOGICAL)
    np.testing.assert_array_equal(maps.logical_count_LE, LOGICAL_COUNT)
    np.testing.assert_array_equal(maps.logical_to_physical_LEX, LOGICAL_TO_PHYSICAL)


def test_copies_are_listed_in_order_of_creation_not_of_slots() -> None:
    maps = eplb(LOAD_LE, slots=16, groups=4, nodes=2, devices=8)
    assert maps.logical_to_physical_LEX[0, 1].tolist() == [15, 13]


def test_groups_that_do_not_divide_over_nodes_mean_one_group_and_one_node() -> None:
    odd = eplb(LOAD_LE, slots=16, groups=3, nodes=2, devices=8)
    whole = eplb(LOAD_LE, slots=16, groups=1, nodes=1, devices=8)
    np.testing.assert_array_equal(odd.physical_to_logical_LS, whole.physical_to_logical_LS)


def test_a_layer_without_load_gives_every_spare_slot_to_expert_0() -> None:
    maps = eplb(np.zeros((1, 6)), slots=8, groups=1, nodes=1, devices=2)
    assert maps.logical_count_LE.tolist() == [[3, 1, 1, 1, 1, 1]]


def test_one_slot_per_device_puts_copy_i_on_device_i_without_looking_at_loads() -> None:
    maps = eplb(np.array([[1.0, 9.0, 5.0, 2.0]]), slots=4, groups=1, nodes=1, devices=4)
    assert maps.physical_to_logical_LS.tolist() == [[0, 1, 2, 3]]


def test_one_hot_expert_gets_several_copies_on_one_device_as_in_the_original() -> None:
    load = np.ones((1, 12))
    load[0, 0] = 1000.0
    maps = eplb(load, slots=32, groups=1, nodes=1, devices=8)
    assert maps.logical_count_LE[0, 0] == 21
    per_device = (maps.physical_to_logical_LS.reshape(8, 4) == 0).sum(axis=1)
    assert per_device.max() >= 2


def test_each_layer_is_placed_as_if_it_were_alone() -> None:
    both = eplb(LOAD_LE, slots=16, groups=4, nodes=2, devices=8)
    for layer in range(2):
        alone = eplb(LOAD_LE[layer : layer + 1], slots=16, groups=4, nodes=2, devices=8)
        np.testing.assert_array_equal(
            both.physical_to_logical_LS[layer], alone.physical_to_logical_LS[0]
        )


@pytest.mark.parametrize(("slots", "groups", "nodes", "devices"), [
    (15, 1, 1, 8),       # slots do not divide over devices
    (16, 5, 1, 8),       # experts do not divide into groups
    (14, 4, 2, 7),       # devices do not divide over nodes
])
def test_sizes_that_do_not_divide_are_refused(
    slots: int, groups: int, nodes: int, devices: int
) -> None:
    with pytest.raises(UsageError):
        eplb(LOAD_LE, slots=slots, groups=groups, nodes=nodes, devices=devices)


@settings(max_examples=40, deadline=None)
@given(
    load=st.lists(st.integers(0, 1000), min_size=8, max_size=8),
    slots=st.sampled_from([8, 12, 16]),
    nodes=st.sampled_from([1, 2]),
)
def test_the_three_maps_agree_and_every_expert_has_a_slot(
    load: list[int], slots: int, nodes: int
) -> None:
    maps = eplb(np.array([load], np.float64), slots=slots, groups=nodes, nodes=nodes, devices=4)
    expert_S = maps.physical_to_logical_LS[0]
    np.testing.assert_array_equal(np.bincount(expert_S, minlength=8), maps.logical_count_LE[0])
    assert maps.logical_count_LE.min() >= 1
    for expert, row in enumerate(maps.logical_to_physical_LEX[0]):
        assert sorted(row[row >= 0]) == np.flatnonzero(expert_S == expert).tolist()


@settings(max_examples=40, deadline=None)
@given(load=st.lists(st.integers(1, 1000), min_size=6, max_size=6), spare=st.integers(0, 4))
def test_copies_make_the_heaviest_copy_as_light_as_any_other_counts_would(
    load: list[int], spare: int
) -> None:
    maps = eplb(np.array([load], np.float64), slots=6 + spare, groups=1, nodes=1, devices=1)
    reached = max(w / c for w, c in zip(load, maps.logical_count_LE[0], strict=True))
    assert reached == pytest.approx(_lightest_heaviest_copy(load, spare))


def _lightest_heaviest_copy(load: list[int], spare: int) -> float:
    """By trying every way to hand out the spare replicas."""
    if len(load) == 1:
        return load[0] / (1 + spare)
    return min(
        max(load[0] / (1 + first), _lightest_heaviest_copy(load[1:], spare - first))
        for first in range(spare + 1)
    )
