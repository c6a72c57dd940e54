"""The searches on spaces that are met rarely: devices without slots, plans of other widths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from loadmaster.errors import InfeasibleError, InputError
from loadmaster.foundation.arrays import SlotArray
from loadmaster.foundation.compiled import random_state
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.cost.token_transfers import no_transfers
from loadmaster.placement.plan import DispatchSpec
from loadmaster.placement.planning_traffic import LayerTraffic
from loadmaster.placement.search import layer_search
from loadmaster.placement.search.annealing.annealer import (
    Overload,
    Schedule,
    SearchSpace,
    search_space,
)
from loadmaster.placement.search.annealing.even_average import improve_average
from loadmaster.placement.search.annealing.exact_balance import improve_exact_balance
from loadmaster.placement.search.annealing.fixed_shares import improve_fixed_shares
from loadmaster.placement.search.annealing.water_filled import improve_water_filled
from loadmaster.placement.search.layer_search import search_layer, within_slots
from loadmaster.placement.search.layer_task import LayerTask

EXPERTS = 6
COOLING, BALANCE = Schedule(3_000, 1e-2, 1e-5), Overload(bend=1.0, free=1.0)


def by_rows(improve: Callable[..., Any], space: SearchSpace, start_GC: SlotArray) -> SlotArray:
    """One search on four skewed steps."""
    load_WE = np.random.default_rng(1).random((4, EXPERTS)) ** 3 + 0.01
    load_WE *= len(start_GC) / load_WE.sum(axis=1, keepdims=True)
    found: SlotArray = improve(
        space, load_WE, np.full(4, 0.25), start_GC, COOLING, BALANCE, no_transfers(len(start_GC)),
        random_state(0, 0),
    ).best_GC
    return found


def on_average(space: SearchSpace, start_GC: SlotArray) -> SlotArray:
    return improve_average(
        space, start_GC, np.arange(1.0, EXPERTS + 1), 3_000, random_state(0, 0)
    )


SEARCHES = [
    partial(by_rows, improve_exact_balance), partial(by_rows, improve_water_filled),
    partial(by_rows, improve_fixed_shares),
    partial(by_rows, partial(improve_fixed_shares, node_G=np.array([0, 0, 1, 1]))),
    on_average,
]
NAMES = ["exact", "water_filled", "alike", "nearest", "average"]


@pytest.mark.parametrize("search", SEARCHES, ids=NAMES)
@pytest.mark.parametrize("slots", [[4, 0, 3, 3], [4, 3, 3, 0], [0, 0, 3, 5]])
def test_a_device_without_slots_stays_empty_and_nothing_is_lost(
    search: Callable[..., SlotArray], slots: list[int]
) -> None:
    """Memory shared between layers may leave a device none in one of them."""
    space = search_space(np.array(slots), np.ones(4), EXPERTS)
    start_GC = np.full((4, max(slots)), -1, np.int16)
    experts = iter(range(EXPERTS))
    for g, n in enumerate(slots):
        for c in range(n):
            start_GC[g, c] = next(experts, -1)
    found_GC = search(space, start_GC)
    assert ((found_GC >= 0).sum(axis=1) <= slots).all()
    assert set(found_GC[found_GC >= 0].tolist()) == set(range(EXPERTS))


@pytest.mark.parametrize("search", SEARCHES, ids=NAMES)
def test_slots_that_do_not_fit_the_space_are_never_searched(
    search: Callable[..., SlotArray],
) -> None:
    space = search_space(np.array([3, 3, 3, 2]), np.ones(4), EXPERTS)
    narrow = np.array([[0, 1], [2, 3], [4, 5], [0, 1]], np.int16)
    with pytest.raises(AssertionError, match="2 slots wide, a device has 3"):
        search(space, narrow)
    beyond = np.array([[0, 1, -1], [2, 3, -1], [4, 5, -1], [0, -1, 1]], np.int16)
    with pytest.raises(AssertionError, match="device 3 holds more than its slots"):
        search(space, beyond)


# ---- standing plans -----------------------------------------------------------------------------


def test_contents_move_into_the_slots_a_device_has_and_others_stay() -> None:
    wide = np.array([[-1, 4, -1, 5], [0, -1, 2, -1]], np.int16)
    fitted = within_slots(wide, np.array([2, 3]))
    assert fitted.tolist() == [[5, 4, -1, -1], [0, -1, 2, -1]]
    assert within_slots(wide, np.array([2, 3]), width=3).tolist() == [[5, 4, -1], [0, -1, 2]]
    assert within_slots(wide[:, :2], np.array([3, 1])).tolist() == [[-1, 4, -1], [0, -1, -1]]
    with pytest.raises(InputError, match=r"holds 2 experts on device 1 in a layer .* has 1 slots"):
        within_slots(wide, np.array([2, 1]))


def test_where_nothing_packs_the_experts_the_standing_plan_is_searched_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_: Any) -> SlotArray:
        raise InfeasibleError("no packing was found")

    monkeypatch.setattr(layer_search, "lpt_swap", fails)
    load_WE = np.array([[9.0, 9, 1, 1]])
    task = LayerTask(
        layer=0, layers=1, traffic=LayerTraffic(None, None, (), None, load_WE, 4),
        slots_G=np.array([2, 2]), capacity_G=None,
        cluster=Cluster.preset("h100", devices_per_node=2, slots_per_device=2),
        dispatch=DispatchSpec(), objective="balance", model=None, slack=0.0, seed=0, effort="fast",
        start_GC=np.array([[0, 1], [2, 3]], np.int16),
    )
    answer = search_layer(task)
    assert answer.name.startswith("search") and answer.planning.peak == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(InfeasibleError, match="no packing was found"):
        search_layer(LayerTask(**{**task.__dict__, "start_GC": None}))
