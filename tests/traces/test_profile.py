"""A profile keeps loads whole, samples whole requests, and counts pairs when asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loadmaster.errors import InputError
from loadmaster.traces.profile import Profile
from loadmaster.traces.steps import StepSampler
from loadmaster.traces.trace import RoutingTrace


def test_loads_are_those_of_the_trace(make_trace: Any) -> None:
    """Whatever is sampled, the windows together hold every assignment, in time order."""
    trace = make_trace()
    profile: Any = Profile.from_trace(trace, windows=5, sample_tokens=30)
    assert np.array_equal(profile.load_LE, trace.load_LE())
    assert profile.num_windows == 5
    first = np.argsort(trace.step, kind="stable")[:40]
    assert np.array_equal(profile.load_WLE[0], trace.load_LE(first))


def test_the_sample_is_whole_requests_with_their_columns(make_trace: Any) -> None:
    """Enough to make steps from; the same seed draws the same ones."""
    trace = make_trace()
    profile: Any = Profile.from_trace(trace, sample_tokens=75, seed=3)
    sample = profile.require_sample()
    assert sample.num_tokens == 70 and profile.sampled_share == 0.35
    for request in set(sample.request):
        assert (sample.request == request).sum() == (trace.request == request).sum()
    again = Profile.from_trace(trace, sample_tokens=75, seed=3)
    assert sample.digest() == again.require_sample().digest()
    assert len(StepSampler(tokens=10, concurrency=2).sample(sample)) > 1


def test_a_small_sample_still_holds_one_request(make_trace: Any) -> None:
    assert Profile.from_trace(make_trace(), sample_tokens=1).require_sample().num_tokens == 10


def test_pairs_are_those_of_a_loop(make_trace: Any) -> None:
    """Co-activation inside a layer and transitions to the next, with k_of_token."""
    trace = make_trace(tokens=30)
    profile: Any = Profile.from_trace(trace)
    together, onward = np.zeros((3, 8, 8), int), np.zeros((2, 8, 8), int)
    for t in range(30):
        chosen = [trace.ids[t, layer, : trace.k_of_token[t, layer]] for layer in range(3)]
        for layer in range(3):
            for e in chosen[layer]:
                for f in chosen[layer]:
                    together[layer, e, f] += 1
                if layer < 2:
                    for f in chosen[layer + 1]:
                        onward[layer, e, f] += 1
    assert np.array_equal(profile.coactivation_LEE(), together)
    assert np.array_equal(profile.transition_LEE(), onward)
    diagonal = profile.coactivation_LEE().diagonal(axis1=1, axis2=2)
    assert np.array_equal(diagonal, trace.load_LE())


def test_pairs_of_unordered_memory_and_wide_ids(make_trace: Any) -> None:
    """uint16 ids, no k_of_token, one layer only."""
    trace = make_trace(tokens=20, layers=1, experts=300, full=False)
    profile: Any = Profile.from_trace(trace)
    assert profile.transition_LEE().shape == (0, 300, 300)
    assert profile.coactivation_LEE().sum() == 20 * 4


def test_loads_alone_say_what_they_cannot() -> None:
    """[L, E] is one window; steps and pairs are refused with a way out."""
    profile = Profile.from_loads([[3, 1, 0], [2, 2, 2]], top_k=2)
    assert profile.load_WLE.shape == (1, 2, 3) and profile.sample is None
    assert profile.num_tokens == 3
    for ask in (profile.require_sample, profile.coactivation_LEE, profile.transition_LEE):
        with pytest.raises(InputError, match="loads only"):
            ask()


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        ([1, 2], {}, "layers, experts"),
        ([[1, -1]], {}, "finite and >= 0"),
        ([[1, np.nan]], {}, "finite"),
        ([[1, 2], [0, 0]], {}, "layer 1 has no load"),
        ([[1, 2]], {"top_k": 3}, "top_k 3"),
        ([[1, 2]], {"layer_indices": (1, 2)}, "names 2 layers"),
    ],
)
def test_loads_that_cannot_be_are_named(load: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Profile.from_loads(load, **options)


def test_an_empty_trace_has_no_profile() -> None:
    empty = RoutingTrace.from_arrays(np.empty((0, 2, 1), int), num_experts=3)
    with pytest.raises(InputError, match="0 tokens"):
        Profile.from_trace(empty)
