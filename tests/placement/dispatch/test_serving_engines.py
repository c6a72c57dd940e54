"""The engines' replica choice: as their own functions chose, and rule by rule in plain Python.

`engine_choices.json` holds what the engines' functions chose (`benchmarks/record_engine_choices.py`
runs them). TensorRT-LLM's kernel needs a GPU: its rule is checked against its words alone.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.placement.cluster import Cluster
from loadmaster.placement.dispatch.assignment import layer_dispatch, layers_draws
from loadmaster.placement.dispatch.fair_choice import fair_choices, first_draws
from loadmaster.placement.dispatch.quotas import count_tokens, route, split
from loadmaster.placement.plan import DispatchSpec

# 4 ranks in 2 nodes. Expert 0 on ranks 0, 1, 3; expert 1 on 1; 2 on 2; 3 on 0 and 3; 4 on 2, 3.
SLOTS = np.array([[0, 3, -1], [0, 1, -1], [2, 4, -1], [3, 4, 0]])
PLACE = Cluster.preset("h100", nodes=2, devices_per_node=2, slots_per_device=3)
SLOTS_OF = {e: [s for s in range(12) if SLOTS.reshape(-1)[s] == e] for e in range(5)}


def tokens(seed: int, count: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(5)[:2] for _ in range(count)])
    return ids, rng.integers(0, 4, count)


def spec(policy: str, **parameters: float) -> DispatchSpec:
    return DispatchSpec(policy=policy, parameters=dict(parameters))


def test_sglang_static_keeps_one_slot_per_rank_and_prefers_near_ones() -> None:
    quotas = split(np.full((4, 5), 7), SLOTS, PLACE, spec("sglang_static"))
    used = {(g, e): [s for s in SLOTS_OF[e] if quotas[g, s]] for g in range(4) for e in range(5)}
    assert all(len(slots) == 1 for slots in used.values())
    assert used[0, 0] == [0] and used[1, 0] == [3] and used[3, 0] == [11]      # own rank
    assert used[2, 0] == [11] and used[2, 3] == [9] and used[1, 3] == [1]      # own node
    assert used[0, 1] == used[2, 1] == used[3, 1] == [4]                       # the only replica
    assert {used[0, 4][0], used[1, 4][0]} == set(SLOTS_OF[4])     # far: a fair pick, one each


def test_sglang_static_fair_picks_serve_equally_many_ranks() -> None:
    """Two replicas in node 0, fourteen ranks elsewhere: seven ranks each, whatever the seed."""
    place = Cluster.preset("h100", nodes=8, devices_per_node=2, slots_per_device=1)
    slots = np.r_[0, 0, np.arange(1, 15)].reshape(16, 1)
    counts = np.zeros((16, 15), int)
    counts[2:, 0] = 1
    picks = set()
    for seed in range(4):
        quotas = split(counts, slots, place, spec("sglang_static", seed=seed))
        assert quotas[:, :2].sum(axis=0).tolist() == [7, 7]
        picks.add(quotas[:, 0].tobytes())
    assert len(picks) > 1          # the seed shuffles who gets which


def test_sglang_dynamic_draws_like_a_fair_coin_and_repeats() -> None:
    counts = np.full((4, 5), 4000)
    quotas = split(counts, SLOTS, PLACE, spec("sglang_dynamic"))
    assert np.array_equal(quotas, split(counts, SLOTS, PLACE, spec("sglang_dynamic")))
    assert not np.array_equal(quotas, split(counts, SLOTS, PLACE, spec("sglang_dynamic", seed=1)))
    for expert in (0, 3, 4):
        share = quotas[:, SLOTS_OF[expert]] / 4000
        sigma = np.sqrt(1 / len(SLOTS_OF[expert]) / 4000)
        assert np.abs(share - 1 / len(SLOTS_OF[expert])).max() < 4 * sigma
        assert share.std() > 0       # drawn, not dealt


RECORDED = json.loads((Path(__file__).parent / "engine_choices.json").read_text())


def cases(policy: str) -> list[Any]:
    found = RECORDED[policy]
    every = enumerate(found["cases"])
    return [pytest.param(case, id=f"{found['engine']} {i}") for i, case in every]


def one_layer(case: dict[str, Any], ranks: int) -> tuple[np.ndarray, Cluster]:
    slots = np.array(case["slots"]).reshape(ranks, -1)
    return slots, Cluster.preset("h100", devices_per_node=ranks, slots_per_device=slots.shape[1])


@pytest.mark.parametrize("case", cases("vllm_hash"))
def test_vllm_hash_chooses_as_its_router(case: dict[str, Any]) -> None:
    """On every rank: another rank's tokens in between change nothing."""
    slots, place = one_layer(case, 1)
    ids = np.array(case["ids"])
    alone = route(ids, np.zeros(len(ids), int), slots, place, spec("vllm_hash"), case["experts"])
    assert alone.tolist() == case["chosen"]
    pairs = Cluster.preset("h100", devices_per_node=2, slots_per_device=slots.shape[1])
    wide = np.concatenate([slots, np.full_like(slots, -1)])
    home = np.arange(2 * len(ids)) % 2
    both = route(np.repeat(ids, 2, axis=0), home, wide, pairs, spec("vllm_hash"), case["experts"])
    assert both.tolist() == np.repeat(case["chosen"], 2, axis=0).tolist()


@pytest.mark.parametrize("case", cases("sglang_rows"))
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sglang_rows_counts_rows_through_the_ranks(case: dict[str, Any], ranks: int) -> None:
    """The batch lies rank after rank, however its tokens came: unequal parts, one of them empty."""
    slots, place = one_layer(case, ranks)
    ids = np.array(case["ids"])
    home = np.sort(np.random.default_rng(ranks).integers(0, max(1, ranks - 1), len(ids)))
    order = np.concatenate([np.flatnonzero(home == g) for g in reversed(range(ranks))])
    chosen = route(ids[order], home[order], slots, place, spec("sglang_rows"), case["experts"])
    assert chosen.tolist() == np.array(case["chosen"])[order].tolist()


@pytest.mark.parametrize("case", cases("sglang_static"))
def test_sglang_static_is_the_table_of_every_rank_in_every_layer(case: dict[str, Any]) -> None:
    slots_LGC = np.array(case["slots"]).reshape(len(case["slots"]), case["ranks"], -1)
    place = Cluster.preset(
        "h100", nodes=case["nodes"], devices_per_node=case["ranks"] // case["nodes"],
        slots_per_device=slots_LGC.shape[2],
    )
    experts, rule = case["experts"], spec("sglang_static")
    ids = np.tile(np.arange(experts)[:, None], (case["ranks"], 1)).astype(np.int32)
    home = np.repeat(np.arange(case["ranks"]), experts).astype(np.int32)
    draws_L = layers_draws(slots_LGC, experts, place, rule)
    for slots_GC, draws, chosen in zip(slots_LGC, draws_L, case["chosen"], strict=True):
        layer = layer_dispatch(slots_GC, experts, place, rule, draws)
        counted = layer.count(ids, home)
        found = layer.place(counted, layer.split(counted.counts_GX))
        assert found.reshape(case["ranks"], experts).tolist() == chosen


def test_layers_that_the_plan_leaves_out_draw_in_sglangs_default_row() -> None:
    """Layers 1 and 3 of a model: 0 and 2 hold expert s mod E in slot s."""
    rng = np.random.default_rng(3)
    place = Cluster.preset("h100", devices_per_node=4, slots_per_device=2)
    default = np.arange(8) % 5
    own = [rng.permutation(default) for _ in range(2)]
    rule = spec("sglang_static")
    whole = np.stack([default, own[0], default, own[1]]).reshape(4, 4, 2)
    every = layers_draws(whole, 5, place, rule)
    some = layers_draws(whole[[1, 3]], 5, place, rule, (1, 3))
    backwards = layers_draws(whole[[3, 1]], 5, place, rule, (3, 1))
    assert np.array_equal(some, [every[1], every[3]])
    assert np.array_equal(backwards, [every[3], every[1]])
    assert not np.array_equal(some[0], every[0])


@pytest.mark.parametrize("case", cases("ascend_fixed"))
def test_ascend_fixed_is_the_table_of_every_rank(case: dict[str, Any]) -> None:
    slots, place = one_layer(case, case["ranks"])
    experts = case["experts"]
    rule = spec("ascend_fixed", tensor_parallel=case["tensor_parallel"])
    quotas = split(np.ones((case["ranks"], experts), int), slots, place, rule)
    assert all(quotas[g, case["chosen"][g]].all() for g in range(case["ranks"]))
    assert (quotas.sum(axis=1) == experts).all()


@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(1, 400), st.integers(1, 200))))
def test_fair_choices_are_pythons_own_draws(seed: int, asked: list[tuple[int, int]]) -> None:
    python, ours = random.Random(seed), first_draws(seed, 1)[0]
    for replicas, ranks in asked:
        whole, rest = divmod(ranks, replicas)
        choices = list(range(replicas)) * whole + python.sample(range(replicas), rest)
        python.shuffle(choices)
        assert fair_choices(ours, replicas, ranks).tolist() == choices


def test_sglang_static_where_one_node_holds_every_replica_shares_them_fairly() -> None:
    """The first replica of the node would serve all six ranks that hold none."""
    place = Cluster.preset("h100", devices_per_node=8, slots_per_device=1)
    slots = np.r_[0, 0, np.arange(1, 7)].reshape(8, 1)
    quotas = split(np.ones((8, 7), int), slots, place, spec("sglang_static"))
    assert quotas[:, :2].sum(axis=0).tolist() == [4, 4]


@pytest.mark.parametrize("offset", [0, 1])
def test_trtllm_deals_in_turn_inside_blocks_of_1024(offset: int) -> None:
    ids, home = tokens(1, 4000)
    chosen = route(ids, home, SLOTS, PLACE, spec("trtllm_round_robin", offset_by_rank=offset), 5)
    for rank in range(4):
        flat = ids[home == rank].reshape(-1)
        got = chosen[home == rank].reshape(-1)
        for start in range(0, len(flat), 1024):
            seen = dict.fromkeys(range(5), 0)
            for i in range(start, min(start + 1024, len(flat))):
                replicas = SLOTS_OF[flat[i]]
                turn = seen[flat[i]] + start // 1024 + offset * rank
                assert got[i] == replicas[turn % len(replicas)]
                seen[flat[i]] += 1


@pytest.mark.parametrize("policy", ["vllm_hash", "trtllm_round_robin", "sglang_rows"])
def test_quotas_without_positions_come_close_to_the_tokens_own(policy: str) -> None:
    """From counts alone the split of an expert differs by what positions would decide."""
    ids, home = tokens(2, 6000)
    exact = np.zeros((4, 12), int)
    chosen = route(ids, home, SLOTS, PLACE, spec(policy), 5)
    np.add.at(exact, (np.repeat(home, 2), chosen.reshape(-1)), 1)
    guessed = split(count_tokens(ids, home, 4, 5), SLOTS, PLACE, spec(policy))
    assert np.abs(exact - guessed).max() <= 0.1 * exact.max()


def test_ascend_takes_rank_mod_copies() -> None:
    quotas = split(np.full((4, 5), 2), SLOTS, PLACE, spec("ascend_fixed"))
    for rank in range(4):
        for expert, replicas in SLOTS_OF.items():
            assert quotas[rank, replicas[rank % len(replicas)]] >= 2, (rank, expert)
    turned = split(np.full((4, 5), 2), SLOTS, PLACE, spec("ascend_fixed", tensor_parallel=2))
    for rank in range(4):
        for expert, replicas in SLOTS_OF.items():
            turn = rank % 2 + rank // 2 + expert
            assert turned[rank, replicas[turn % len(replicas)]] == 2, (rank, expert)
