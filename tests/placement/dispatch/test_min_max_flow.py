"""Blocks of tokens over devices: water-filling, the flattest split, the cheapest one under caps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.placement.dispatch.min_max_flow import (
    falling_order,
    flattest,
    push_excess,
    water_fill,
)


@given(st.lists(st.integers(0, 5), max_size=40))
def test_falling_order_is_a_stable_sort(values: list[int]) -> None:
    order = falling_order(np.array(values, np.int64))
    assert order.tolist() == sorted(range(len(values)), key=lambda i: -values[i])


@given(st.integers(0, 60), st.lists(st.integers(0, 30), min_size=2, max_size=5),
       st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_water_fills_the_lowest_first(tokens: int, loads: list[int], seed: int) -> None:
    """No option that got a token ends above what one more token would make of another."""
    speed = np.random.default_rng(seed).choice([1.0, 1.0, 2.0], len(loads))
    load = np.array(loads, np.int64)
    flow = np.zeros(len(loads), np.int64)
    water_fill(tokens, 0, len(loads), np.arange(len(loads), dtype=np.int32), flow, load, speed)
    assert flow.sum() == tokens and (flow >= 0).all() and np.array_equal(load, loads + flow)
    top = max(((load[i]) / speed[i] for i in range(len(loads)) if flow[i]), default=0.0)
    assert top <= min((load[i] + 1) / speed[i] for i in range(len(loads))) + 1e-9


def problem(seed: int) -> tuple[np.ndarray, ...]:
    """Few small blocks on few devices, with costs."""
    rng = np.random.default_rng(seed)
    devices, blocks = int(rng.integers(2, 4)), int(rng.integers(1, 4))
    options = [np.sort(rng.permutation(devices)[: rng.integers(2, devices + 1)])
               for _ in range(blocks)]
    tokens = rng.integers(1, 5, blocks)
    start = np.r_[0, np.cumsum([len(o) for o in options])].astype(np.int32)
    device = np.concatenate(options).astype(np.int32)
    cost = rng.integers(0, 3, len(device)).astype(np.int32)
    fixed = rng.integers(0, 4, devices)
    return tokens, start, device, cost, fixed


def all_splits(
    tokens: np.ndarray, start: np.ndarray, device: np.ndarray, fixed: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every (flow, load) there is."""
    per_block = []
    for b, n in enumerate(tokens):
        width = start[b + 1] - start[b]
        per_block.append([c for c in itertools.product(range(n + 1), repeat=width) if sum(c) == n])
    found = []
    for pick in itertools.product(*per_block):
        flow = np.concatenate(pick)
        found.append((flow, fixed + np.bincount(device, flow, len(fixed)).astype(int)))
    return found


@pytest.mark.parametrize("seed", range(30))
def test_the_flattest_split_is_the_best_of_all(seed: int) -> None:
    tokens, start, device, cost, fixed = problem(seed)
    flow, load = np.zeros(len(device), np.int64), fixed.copy()
    cap = np.empty(len(fixed), np.int64)
    bound = flattest(tokens, start, device, 0 * cost, flow, load, np.ones(len(fixed)), 0.0, cap)
    best = min(int(other.max()) for _, other in all_splits(tokens, start, device, fixed))
    assert load.max() == best and bound <= best
    assert np.array_equal(load, fixed + np.bincount(device, flow, len(fixed)))


@pytest.mark.parametrize("seed", range(30))
def test_the_cheapest_split_under_caps_is_the_cheapest_of_all(seed: int) -> None:
    """Starting from everyone at the cheapest option, excess leaves on cheapest paths."""
    tokens, start, device, cost, fixed = problem(seed)
    splits = all_splits(tokens, start, device, fixed)
    cap = np.full(len(fixed), max(min(int(load.max()) for _, load in splits), fixed.max()))
    flow, load = np.zeros(len(device), np.int64), fixed.copy()
    for b, n in enumerate(tokens):
        o = start[b] + int(np.argmin(cost[start[b] : start[b + 1]]))
        flow[o], load[device[o]] = n, load[device[o]] + n
    done, _ = push_excess(start, device, cost, flow, load, cap)
    cheapest = min(int(f @ cost) for f, other in splits if (other <= cap).all())
    assert done and (load <= cap).all() and flow @ cost == cheapest


def test_impossible_caps_name_the_devices_that_are_stuck() -> None:
    """Block 0 lives on devices 0 and 1 alone; device 2 is free but out of reach."""
    start, device = np.array([0, 2], np.int32), np.array([0, 1], np.int32)
    flow, load = np.array([10, 0]), np.array([10, 0, 0])
    done, reached = push_excess(start, device, np.zeros(2, np.int32), flow, load,
                                np.array([4, 4, 4]))
    assert not done and reached.tolist() == [True, True, False]
    assert load.tolist() == [6, 4, 0]
