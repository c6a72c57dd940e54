"""An emergency plan covers every expert on the survivors, or says why not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.errors import InfeasibleError
from loadmaster.placement.plan import Plan
from loadmaster.workers.coordinator.recovery import with_more_ranks, without_ranks
from loadmaster.workers.protocol.phase_plans import PhasePlans


def plans(*rows: list[int], experts: int) -> PhasePlans:
    return PhasePlans.both(Plan(slots=np.array([rows]), num_experts=experts))


def rows_of(result: PhasePlans) -> list[list[int]]:
    return result.prefill.slots[0].tolist()


def test_lost_experts_fill_free_slots_first_then_new_ones() -> None:
    given_plans = plans([0, 1], [2, -1], [3, 4], experts=5)
    assert rows_of(without_ranks(given_plans, [2], None)) == [[0, 1, 4], [2, 3, -1]]


def test_at_the_limit_a_replica_makes_room() -> None:
    given_plans = plans([0, 1], [0, 2], [3, -1], experts=4)
    assert rows_of(without_ranks(given_plans, [2], 2)) == [[3, 1], [0, 2]]


def test_experts_that_live_on_elsewhere_do_not_move() -> None:
    given_plans = plans([0, 1], [1, 2], [2, 0], experts=3)
    assert rows_of(without_ranks(given_plans, [1], None)) == [[0, 1], [2, 0]]


def test_too_few_slots_is_said_with_numbers() -> None:
    given_plans = plans([0, 1], [2, 3], experts=4)
    with pytest.raises(
        InfeasibleError, match=r"layer 0: 1 surviving devices have 3 slots for 4 experts: 1 short"
    ):
        without_ranks(given_plans, [1], 3)


def test_no_survivor_is_an_error() -> None:
    with pytest.raises(InfeasibleError, match="all 2 devices are lost"):
        without_ranks(plans([0], [1], experts=2), [0, 1], None)


def test_new_ranks_join_empty() -> None:
    assert rows_of(with_more_ranks(plans([0, 1], experts=2), 3)) == [[0, 1], [-1, -1], [-1, -1]]


@given(st.data())
def test_every_expert_is_covered_and_survivors_keep_what_they_can(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(2, 5))
    experts = data.draw(st.integers(1, 12))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    width = -(-experts // ranks) + data.draw(st.integers(0, 2))
    slots = np.full((2, ranks, width), -1)
    for layer in range(2):
        for rank, part in enumerate(np.array_split(rng.permutation(experts), ranks)):
            slots[layer, rank, : len(part)] = part
            spare = rng.permutation(np.setdiff1d(np.arange(experts), part))[: width - len(part)]
            slots[layer, rank, len(part) : len(part) + len(spare)] = spare
    before = PhasePlans.both(Plan(slots=slots, num_experts=experts))
    lost = sorted(data.draw(st.sets(st.integers(0, ranks - 1), max_size=ranks - 1)))
    after = without_ranks(before, lost, None).prefill      # a Plan covers all, or cannot be made
    survivors = [g for g in range(ranks) if g not in lost]
    for new, old in enumerate(survivors):
        kept = slots[:, old]
        assert np.array_equal(after.slots[:, new, :width][kept >= 0], kept[kept >= 0])
    assert after.same_slots(without_ranks(before, lost, None).prefill)
