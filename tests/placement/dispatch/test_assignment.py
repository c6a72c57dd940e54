"""One rule for the whole step and for ranks that see their own tokens only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.dispatch.assignment import counts_gathered_first, layer_dispatch
from loadmaster.placement.dispatch.policies import POLICIES
from loadmaster.placement.dispatch.quotas import route
from loadmaster.placement.plan import DispatchSpec

Step = tuple[Cluster, np.ndarray, np.ndarray, np.ndarray, int]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """(cluster, slots [G, C], ids [T, K], home [T], experts); some ranks may have no token."""
    payload = draw(st.sampled_from(["per_expert", "per_rank", "per_node"]))
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    devices, experts = nodes * per_node, draw(st.integers(2, 10))
    width = -(-experts // devices) + draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    spare = rng.integers(-1, experts, devices * width - experts)
    slots = rng.permutation(np.r_[np.arange(experts), spare]).reshape(devices, width)
    tokens, choices = draw(st.integers(0, 80)), draw(st.integers(1, min(4, experts)))
    ids = np.array([rng.permutation(experts)[:choices] for _ in range(tokens)], np.int32)
    ids = ids.reshape(tokens, choices)
    ids[rng.random(ids.shape) < 0.05] = -1
    home = rng.integers(0, devices, tokens).astype(np.int32)
    cluster = Cluster.preset(
        "h100", nodes=nodes, devices_per_node=per_node, slots_per_device=width,
        traffic=f"return_home/{payload}", speeds=rng.choice([0.5, 1.0, 2.0], devices).tolist(),
    )
    return cluster, slots, ids, home, experts


@pytest.mark.parametrize("policy", POLICIES)
@given(step=steps())
@settings(max_examples=70, deadline=None)
def test_ranks_reach_the_slots_of_the_whole_step_from_their_own_tokens(
    step: Step, policy: str
) -> None:
    """Each counts and places its own tokens; the counts alone are shared."""
    cluster, slots, ids, home, experts = step
    spec = DispatchSpec(policy=policy)
    whole = route(ids, home, slots, cluster, spec, experts)
    layer = layer_dispatch(slots, experts, cluster, spec)
    own = [layer.count(ids[home == g], home[home == g]) for g in range(cluster.num_devices)]
    gathered = np.stack([counted.counts_GX[g] for g, counted in enumerate(own)])
    assert gathered.shape[1] == layer.num_counts
    for g, counted in enumerate(own):
        split = layer.split(gathered)
        quotas = layer.quotas(gathered, split)
        chosen = layer.place(counted, split)
        assert np.array_equal(chosen, whole[home == g])
        sent = np.bincount(chosen[chosen >= 0], minlength=slots.size)
        assert np.array_equal(quotas[g], sent)


@pytest.mark.parametrize("policy", POLICIES)
@given(step=steps())
@settings(max_examples=60, deadline=None)
def test_every_choice_gets_a_slot_of_its_expert(step: Step, policy: str) -> None:
    cluster, slots, ids, home, experts = step
    chosen = route(ids, home, slots, cluster, DispatchSpec(policy=policy), experts)
    assert np.array_equal(chosen < 0, ids < 0)
    kept = ids >= 0
    assert np.array_equal(slots.reshape(-1)[chosen[kept]], ids[kept])


def test_counts_of_other_tokens_are_refused() -> None:
    """Quotas that hold nothing for a token are never filled by guessing."""
    cluster = Cluster.preset("h100", devices_per_node=2, slots_per_device=1)
    layer = layer_dispatch(np.array([[0], [1]]), 2, cluster, DispatchSpec())
    home = np.zeros(2, np.int32)
    counted = layer.count(np.array([[0], [0]], np.int32), home)
    others = layer.count(np.array([[0], [1]], np.int32), home).counts_GX
    with pytest.raises(InputError, match="token 1 found no quota left"):
        layer.place(counted, layer.split(others))


def test_an_expert_without_a_slot_is_named() -> None:
    cluster = Cluster.preset("h100", devices_per_node=2, slots_per_device=1)
    ids, home = np.array([[0], [2]]), np.zeros(2, int)
    with pytest.raises(InputError, match="expert 2 has tokens but no slot"):
        route(ids, home, np.array([[0], [1]]), cluster, DispatchSpec(), 3)


def test_counts_by_class_grow_with_the_sets_of_ranks_that_hold_an_expert() -> None:
    """Expert 0 on three ranks: seven sets; 1 on two: three; the others: one each."""
    place = Cluster.preset(
        "h100", devices_per_node=3, slots_per_device=3, traffic="return_home/per_rank"
    )
    slots = np.array([[0, 1, 2], [0, 1, 3], [0, 4, 5]])
    assert layer_dispatch(slots, 6, place, DispatchSpec()).num_counts == 7 + 3 + 4
    assert layer_dispatch(slots, 6, place, DispatchSpec(policy="even")).num_counts == 6
    assert layer_dispatch(slots, 6, place, DispatchSpec(policy="vllm_hash")).num_counts == 9
    assert counts_gathered_first(6, place) == 24
