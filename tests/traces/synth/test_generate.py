"""Synthetic loads bit for bit as published, and traces with the statistics asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loadmaster.errors import UsageError
from loadmaster.traces.analysis.drift import drift, entropy_bits
from loadmaster.traces.profile import Profile
from loadmaster.traces.synth.generate import FAMILIES, instance, synth_trace, zipf_shares
from loadmaster.traces.trace import PREFILL, RoutingTrace


@pytest.mark.parametrize(
    ("name", "zipf", "first_five"),
    [
        ("a288", 0.5, [6791, 5285, 3552, 7030, 2957]),
        ("a320", 1.0, [3800, 2919, 1201, 5046, 1092]),
        ("b320", 1.0, [3800, 2919, 1201, 5046, 1092]),
        ("c512", 0.5, [1937, 5170, 3339, 6560, 2688]),
        ("c512", 1.0, [574, 3162, 1315, 6464, 1140]),
    ],
)
def test_families_have_the_published_fingerprints(
    name: str, zipf: float, first_five: list[int]
) -> None:
    """Seed 0, layer 0; every layer holds 200,000 tokens of eight choices."""
    made, family = instance(name, zipf, seed=0), FAMILIES[name]
    assert made.load_LE[0, :5].tolist() == first_five
    for load in (made.load_LE, made.next_LE, made.drifted_LE):
        assert load.shape == (family.layers, family.experts)
        assert (load.sum(axis=1) == 1_600_000).all()


@pytest.mark.parametrize(
    ("name", "half", "one"), [("a288", 1.08, 3.97), ("b320", 2.16, 7.93), ("c512", 3.45, 15.63)]
)
def test_families_have_the_published_skew(name: str, half: float, one: float) -> None:
    """Hottest expert over mean device load, mean over layers and three seeds."""
    for zipf, expected in ((0.5, half), (1.0, one)):
        ratios = []
        for seed in range(3):
            load = instance(name, zipf, seed).load_LE
            ratios.append((load.max(1) / (load.sum(1) / FAMILIES[name].devices)).mean())
        assert np.mean(ratios) == pytest.approx(expected, abs=0.02)


def test_the_next_sample_is_the_same_traffic_and_the_drifted_one_is_not() -> None:
    made = instance("a288", 1.0, seed=1)
    near = np.abs(made.next_LE - made.load_LE).sum() / made.load_LE.sum()
    far = np.abs(made.drifted_LE - made.load_LE).sum() / made.load_LE.sum()
    assert near < 0.03 < 0.15 < far


def test_an_instance_routes_tokens_by_its_shares() -> None:
    """Its trace has the shape of the family and follows the shares."""
    made = instance("a288", 0.5, seed=0)
    trace = made.trace(2000)
    assert trace.ids.shape == (2000, 58, 8)
    share = trace.load_LE() / (2000 * 8)
    assert np.corrcoef(share.ravel(), made.share_LE.ravel())[0, 1] > 0.97


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(UsageError, match="a288, a320, b320, c512"):
        instance("a999", 1.0, 0)


def test_without_blocks_choices_follow_the_law_of_sampling_without_replacement() -> None:
    """First choices have the shares themselves; pairs have successive sampling's probabilities."""
    share = np.array([[0.5, 0.25, 0.15, 0.1]])
    trace: Any = synth_trace(share_LE=share, top_k=2, tokens=60_000, block_share=0.0, seed=3)
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (trace.ids[:, 0, 0], trace.ids[:, 0, 1]), 1 / 60_000)
    p = share[0]
    expected = p[:, None] * p[None, :] / (1 - p[:, None])
    np.fill_diagonal(expected, 0)
    assert np.abs(pairs - expected).max() < 0.01


@pytest.mark.parametrize(("experts", "top_k"), [(8, 8), (6, 5), (300, 4), (256, 8)])
def test_no_expert_occurs_twice_in_a_choice(experts: int, top_k: int) -> None:
    """Also where almost every expert is chosen and shares are steep."""
    trace: Any = synth_trace(layers=2, experts=experts, top_k=top_k, tokens=500, zipf=2.0)
    ordered = np.sort(trace.ids, axis=2)
    assert (np.diff(ordered.astype(int), axis=2) > 0).all()
    assert trace.num_experts == experts


def test_affinity_ties_consecutive_layers_together() -> None:
    """Mutual information of experts in layers l and l+1: real routers have about 0.5 bits."""
    options: dict[str, Any] = dict(layers=4, experts=32, top_k=4, tokens=20_000, zipf=0.6)
    tied = layer_information(synth_trace(**options))
    loose = layer_information(synth_trace(**options, affinity=0.0, persistence=0.0))
    assert 0.2 < tied < 1.0 and loose < 0.02


def test_persistence_ties_the_tokens_of_a_request_together() -> None:
    """Neighbours in a request share experts more often than strangers do."""
    trace: Any = synth_trace(layers=4, experts=32, top_k=4, tokens=20_000, zipf=0.6)
    strangers = np.random.default_rng(0).permutation(trace.num_tokens)
    near = repeat_share(trace.ids[:-1], trace.ids[1:])
    assert near > 1.2 * repeat_share(trace.ids, trace.ids[strangers])


def test_domains_differ_and_may_take_turns() -> None:
    """At random over requests, or in stretches of tokens."""
    options: dict[str, Any] = dict(
        layers=3, experts=16, top_k=2, tokens=12_000, domains=3, request_tokens=40
    )
    mixed: Any = synth_trace(**options)
    turns: Any = synth_trace(**options, switch_tokens=2000)
    assert drift(mixed.slice_domains([0]), mixed.slice_domains([2])).bits > 0.05
    assert len(np.flatnonzero(np.diff(turns.domain))) == 5 < 100 < np.count_nonzero(
        np.diff(mixed.domain)
    )
    first_token = np.searchsorted(turns.request, np.unique(turns.request))
    assert np.array_equal(turns.domain[first_token], first_token // 2000 % 3)


def test_requests_begin_with_prefill_and_have_the_length_asked_for() -> None:
    trace: Any = synth_trace(layers=1, experts=8, top_k=1, tokens=30_000, request_tokens=60)
    _, sizes = np.unique(trace.request, return_counts=True)
    assert np.mean(sizes) == pytest.approx(60, rel=0.15)
    starts = np.searchsorted(trace.request, np.unique(trace.request))
    assert (trace.phase[starts] == PREFILL).all()
    assert np.mean(trace.phase == PREFILL) == pytest.approx(0.7, abs=0.02)


def test_the_same_seed_gives_the_same_trace() -> None:
    options: dict[str, Any] = dict(layers=2, experts=16, top_k=2, tokens=1000)
    assert synth_trace(**options, seed=4).digest() == synth_trace(**options, seed=4).digest()
    assert synth_trace(**options, seed=4).digest() != synth_trace(**options, seed=5).digest()


def test_a_token_depends_on_its_request_alone() -> None:
    """A longer trace begins with the shorter one's requests."""
    options: dict[str, Any] = dict(layers=2, experts=16, top_k=2, share_LE=zipf_shares(
        np.random.default_rng(0), 2, 16, 1.0), request_tokens=10)
    short: Any = synth_trace(**options, tokens=100)
    long: Any = synth_trace(**options, tokens=200)
    same = min(short.request.max(), 5)
    assert np.array_equal(
        short.ids[short.request < same], long.ids[long.request < same]
    )


@pytest.mark.parametrize(
    "options",
    [{"top_k": 9}, {"top_k": 0}, {"tokens": 0}, {"domains": 0}, {"affinity": 1.5}, {"blocks": 99},
     {"layers": 0}, {"layers": 10**12}, {"experts": 0}, {"experts": 10**6}, {"zipf": float("nan")},
     {"zipf": -1.0}, {"zipf": 1e9}, {"switch_tokens": 0}],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        synth_trace(**{"layers": 1, "experts": 8, "top_k": 2, "tokens": 10, **options})


def layer_information(trace: RoutingTrace) -> float:
    """Mean mutual information in bits between the experts of consecutive layers."""
    counts = Profile.from_trace(trace).transition_LEE().astype(float)
    joint = counts / counts.sum(axis=(1, 2), keepdims=True)
    first, second = joint.sum(axis=2), joint.sum(axis=1)
    whole = entropy_bits(joint.reshape(len(joint), -1))
    return float(np.mean(entropy_bits(first) + entropy_bits(second) - whole))


def repeat_share(first_TLK: Any, second_TLK: Any) -> float:
    """Share of a token's experts that the other token chose, too."""
    return float((first_TLK[..., None] == second_TLK[..., None, :]).any(-1).mean())
