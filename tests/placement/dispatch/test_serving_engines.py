"""The engines' replica choice, rule by rule, against plain Python of the same words."""

from __future__ import annotations

import numpy as np
import pytest

from loadmaster.placement.cluster import Cluster
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


def test_vllm_hashes_the_flat_position_on_the_rank() -> None:
    ids, home = tokens(0)
    chosen = route(ids, home, SLOTS, PLACE, spec("vllm_hash"), 5)
    for rank in range(4):
        mine = np.flatnonzero(home == rank)
        for row, t in enumerate(mine):
            for k in range(2):
                replicas = SLOTS_OF[ids[t, k]]
                turn = (2654435769 * (row * 2 + k) % 2**32) % len(replicas)
                assert chosen[t, k] == replicas[turn]


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


@pytest.mark.parametrize("policy", ["vllm_hash", "trtllm_round_robin"])
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
