"""Packing: heaviest first, and no replica where an expert would be left without a place."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.placement.methods.pack import pack_heaviest_first


def test_the_heaviest_copy_goes_where_it_would_finish_first() -> None:
    packed = pack_heaviest_first(np.array([7.0, 6, 5, 4]), np.ones(4, int), np.array([2, 2]))
    assert packed.tolist() == [[0, 3], [1, 2]]


def test_replicas_never_take_the_memory_that_first_copies_need() -> None:
    """The hot expert's second replica would fill device 1, and the large cold one fit nowhere."""
    packed = pack_heaviest_first(
        np.array([100.0, 1.0]), np.array([2, 1]), np.array([2, 2]),
        size_E=np.array([6.0, 10.0]), capacity_G=np.array([10.0, 10.0]),
    )
    assert sorted(packed[packed >= 0].tolist()) == [0, 1]


def test_with_room_left_replicas_come_after_all_first_copies() -> None:
    packed = pack_heaviest_first(
        np.array([90.0, 2.0, 1.0]), np.array([3, 1, 1]), np.array([2, 2, 2]),
        size_E=np.array([4.0, 4.0, 8.0]), capacity_G=np.array([8.0, 8.0, 8.0]),
    )
    assert set(packed[packed >= 0].tolist()) == {0, 1, 2}
    assert (packed == 0).sum() == 2            # the third replica would need device 2's memory


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_where_every_expert_fits_alone_every_expert_is_placed(data: st.DataObject) -> None:
    """Sizes of 1 and room for one expert in each slot: whatever the replicas, nobody is missing."""
    devices, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    experts = data.draw(st.integers(1, devices * width))
    replicas = data.draw(st.lists(st.integers(1, devices), min_size=experts, max_size=experts))
    load = data.draw(st.lists(st.integers(0, 99), min_size=experts, max_size=experts))
    room = np.full(devices, float(width))
    packed = pack_heaviest_first(
        np.array(load, float), np.array(replicas), np.full(devices, 5), size_E=np.ones(experts),
        capacity_G=room,
    )
    assert set(packed[packed >= 0].tolist()) == set(range(experts))
    assert ((packed >= 0).sum(axis=1) <= width).all()
    for row in packed:
        held = row[row >= 0]
        assert len(set(held.tolist())) == len(held)
