"""What every dispatch policy promises, and what each of them is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import InputError, UsageError
from loadmaster.placement.cluster import Cluster
from loadmaster.placement.dispatch.policies import SLACK_ACROSS_NODES
from loadmaster.placement.dispatch.quotas import (
    POLICIES,
    device_tokens,
    needs_all_counts,
    route,
    split,
)
from loadmaster.placement.plan import DispatchSpec


def cluster(nodes: int = 1, per_node: int = 2, slots: int = 2, **more: object) -> Cluster:
    return Cluster.preset(
        "h100", nodes=nodes, devices_per_node=per_node, slots_per_device=slots,
        **more,  # type: ignore[arg-type]
    )


def spec(policy: str, **parameters: float) -> DispatchSpec:
    return DispatchSpec(policy=policy, parameters=dict(parameters))


@st.composite
def layers(draw: st.DrawFn) -> tuple[Cluster, np.ndarray, np.ndarray]:
    """A cluster, one layer's slots (spare ones at random, some empty), counts by home rank."""
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    devices = nodes * per_node
    experts = draw(st.integers(1, 8))
    width = -(-experts // devices) + draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    spare = rng.integers(-1, experts, devices * width - experts)
    slots = rng.permutation(np.concatenate([np.arange(experts), spare])).reshape(devices, width)
    counts = rng.poisson(draw(st.sampled_from([0.3, 5, 60])), (devices, experts))
    speeds = rng.choice([0.5, 1.0, 2.0], devices) if draw(st.booleans()) else np.ones(devices)
    return cluster(nodes, per_node, width, speeds=list(speeds)), slots, counts


@given(layers(), st.sampled_from(sorted(POLICIES)))
@settings(max_examples=150, deadline=None)
def test_every_token_goes_to_a_slot_of_its_expert(
    layer: tuple[Cluster, np.ndarray, np.ndarray], policy: str
) -> None:
    place, slots, counts = layer
    quotas = split(counts, slots, place, spec(policy))
    assert quotas.dtype == np.int32 and (quotas >= 0).all()
    flat = slots.reshape(-1)
    by_expert = np.stack(
        [quotas[:, flat == e].sum(axis=1) for e in range(counts.shape[1])], axis=1
    )
    assert np.array_equal(by_expert, counts)
    assert quotas[:, flat < 0].sum() == 0


@given(layers(), st.sampled_from(sorted(POLICIES)))
@settings(max_examples=100, deadline=None)
def test_device_tokens_are_those_of_the_quotas(
    layer: tuple[Cluster, np.ndarray, np.ndarray], policy: str
) -> None:
    place, slots, counts = layer
    tokens, active = device_tokens(np.stack([counts, 0 * counts]), slots, place, spec(policy))
    used = split(counts, slots, place, spec(policy)).sum(axis=0).reshape(slots.shape)
    assert np.array_equal(tokens, [used.sum(axis=1), 0 * used.sum(axis=1)])
    assert np.array_equal(active[0], (used > 0).sum(axis=1)) and not active[1].any()


@given(layers(), st.sampled_from(sorted(POLICIES)), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_routing_follows_the_quotas(
    layer: tuple[Cluster, np.ndarray, np.ndarray], policy: str, seed: int
) -> None:
    place, slots, counts = layer
    home, ids = np.nonzero(counts)
    repeats = counts[home, ids]
    order = np.random.default_rng(seed).permutation(repeats.sum())
    home, ids = np.repeat(home, repeats)[order], np.repeat(ids, repeats)[order][:, None]
    chosen = route(ids, home, slots, place, spec(policy), counts.shape[1])
    assert np.array_equal(slots.reshape(-1)[chosen], ids)
    if not POLICIES[policy].by_position:
        quotas = split(counts, slots, place, spec(policy))
        assert np.array_equal(count_slots(chosen, home, quotas.shape), quotas)


def count_slots(slot_TK: np.ndarray, home: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    counted = np.zeros(shape, np.int64)
    np.add.at(counted, (np.repeat(home, slot_TK.shape[1]), slot_TK.reshape(-1)), 1)
    return counted


@given(layers(), st.sampled_from(["balanced", "fewest_active"]))
@settings(max_examples=60, deadline=None)
def test_renaming_devices_of_a_node_leaves_levels_alone(
    layer: tuple[Cluster, np.ndarray, np.ndarray], policy: str
) -> None:
    """The highest level under balanced, the most active under fewest_active."""
    place, slots, counts = layer
    turned = np.concatenate([
        np.flatnonzero(place.node_G == n)[::-1] for n in range(place.num_nodes)
    ])
    mirrored = place.model_copy(update={"devices": tuple(place.devices[g] for g in turned)})
    here = device_tokens(counts[None], slots, place, spec(policy))
    there = device_tokens(counts[turned][None], slots[turned], mirrored, spec(policy))
    which = 0 if policy == "balanced" else 1
    assert level(here[which][0], place) == pytest.approx(
        level(there[which][0], mirrored), rel=SLACK_ACROSS_NODES, abs=1 / place.speed_G.min()
    )


def level(tokens_G: np.ndarray, place: Cluster) -> float:
    return float((tokens_G / place.speed_G).max())


# ---- even and nearest -----------------------------------------------------------------------


def test_even_spreads_and_turns_the_odd_token() -> None:
    """Expert 0 has three slots: 7 tokens are 3 + 2 + 2, the odd one moving on with the home."""
    slots = np.array([[0, 1], [0, 1], [0, -1]])
    counts = np.array([[7, 0], [7, 0], [0, 3]])
    quotas = split(counts, slots, cluster(1, 3), spec("even"))
    assert quotas[0].tolist() == [3, 0, 2, 0, 2, 0]
    assert quotas[1].tolist() == [2, 0, 3, 0, 2, 0]
    assert quotas[2].tolist() == [0, 1, 0, 2, 0, 0]     # (home 2 + expert 1) mod 2 = slot 1 first


def test_nearest_prefers_its_rank_then_its_node() -> None:
    slots = np.array([[0, 1], [2, 3], [0, 2], [1, 0]])
    counts = np.zeros((4, 4), int)
    counts[0, 0] = counts[1, 0] = counts[1, 3] = counts[3, 3] = 4
    quotas = split(counts, slots, cluster(2, 2), spec("nearest"))
    assert quotas[0, 0] == 4          # own rank
    assert quotas[1, 0] == 4          # own node, although node 1 has two replicas
    assert quotas[1, 3] == 4          # the only replica
    assert quotas[3, 3] == 4          # no replica near: the other node
    counts = np.zeros((4, 4), int)
    counts[2, 0] = 5
    assert split(counts, slots, cluster(2, 2), spec("nearest"))[2, 4] == 5


# ---- errors ---------------------------------------------------------------------------------


def test_unknown_policies_and_parameters_are_named() -> None:
    slots, counts = np.array([[0], [0]]), np.ones((2, 1), int)
    with pytest.raises(UsageError, match="unknown dispatch 'best'"):
        split(counts, slots, cluster(), spec("best"))
    with pytest.raises(UsageError, match="balanced has no parameter 'seed'; it takes: slack"):
        split(counts, slots, cluster(), spec("balanced", seed=1))
    for bad in (-0.1, float("nan")):
        with pytest.raises(UsageError, match="slack"):
            split(counts, slots, cluster(), spec("balanced", slack=bad))
    with pytest.raises(UsageError, match="tensor_parallel 0 is too small"):
        split(counts, slots, cluster(), spec("ascend_fixed", tensor_parallel=0))


def test_shapes_and_homeless_experts_are_refused() -> None:
    place = cluster()
    with pytest.raises(InputError, match="expert 1 has tokens but no slot"):
        split(np.ones((2, 2), int), np.array([[0], [0]]), place, spec("even"))
    with pytest.raises(InputError, match="2 home ranks"):
        split(np.ones((3, 1), int), np.array([[0], [0]]), place, spec("even"))
    with pytest.raises(InputError, match="2 devices"):
        split(np.ones((2, 1), int), np.array([[0]]), place, spec("even"))
    with pytest.raises(InputError, match="names expert 4, counts know 1"):
        split(np.ones((2, 1), int), np.array([[0], [4]]), place, spec("even"))


def test_unknown_homes_are_for_policies_that_can_do_without() -> None:
    slots, counts = np.array([[0, 1], [0, 2]]), np.array([[[9, 3, 2]]])
    tokens, _ = device_tokens(counts, slots, cluster(), spec("balanced"))
    assert tokens.tolist() == [[7, 7]]
    tokens, _ = device_tokens(counts, slots, cluster(), spec("even"))
    assert sorted(tokens[0]) == [6, 8]
    with pytest.raises(UsageError, match="needs counts by home rank"):
        device_tokens(counts, slots, cluster(), spec("nearest"))


def test_who_needs_the_counts_of_all_ranks() -> None:
    assert [p for p in POLICIES if needs_all_counts(spec(p))] == ["balanced", "fewest_active"]


def test_nothing_to_dispatch() -> None:
    slots = np.array([[0, 1], [1, 0]])
    for policy in POLICIES:
        assert not split(np.zeros((2, 2), int), slots, cluster(), spec(policy)).any()


# ---- fewest_active --------------------------------------------------------------------------


@given(layers())
@settings(max_examples=80, deadline=None)
def test_fewest_active_is_the_fewest_there_can_be(
    layer: tuple[Cluster, np.ndarray, np.ndarray],
) -> None:
    place, slots, counts = layer
    used = np.flatnonzero(counts.sum(axis=0))
    choices = [np.unique(np.nonzero(slots == e)[0]) for e in used]
    if np.prod([len(c) for c in choices], initial=1) > 3000:
        return
    best = min(
        (level(np.bincount(pick, minlength=len(slots)), place)
         for pick in itertools.product(*choices)),
        default=0.0,
    )
    _, active = device_tokens(counts[None], slots, place, spec("fewest_active"))
    assert active.sum() == len(used)          # one slot each
    # A device of speed s may hold ceil(level * s) whole experts.
    allowed = np.ceil(best * place.speed_G - 1e-9)
    assert (active[0] <= allowed).all()
